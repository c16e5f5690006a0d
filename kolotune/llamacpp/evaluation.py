"""A GGUF as llama.cpp computes it, as exactly as it can: log-probabilities, tokens, texts of tokens.

On the CPU, with the keys and values of attention in fp32 and without flash attention, so that a difference comes
from the weights. Text from a GGUF the way a server makes it is `inference`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError, ToolchainError

from .log import only_problems

if TYPE_CHECKING:
    import numpy as np

BATCH = 256
"""So many tokens are computed together."""

_TYPE_F32 = 0
_NO_FLASH_ATTENTION = 0
_LONGEST_PIECE = 4096


class ExactGguf:
    """A GGUF for measuring.

    Args:
        path: the file.
        context: the longest row of tokens that it has to read.
        seen: llama.cpp's callback for evaluations, as ``(address of a tensor, asked, nothing)``.

    Raises:
        ArtifactError: llama.cpp can't load it.
        ToolchainError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path, context: int, seen: Callable[[int, bool, Any], bool] | None = None) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise ToolchainError(f"llama-cpp-python can't be loaded: {error}") from None
        self._library: Any = llama_cpp
        only_problems()
        llama_cpp.llama_backend_init()
        with_model: Any = llama_cpp.llama_model_default_params()
        with_model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), with_model)
        if not self._model:
            raise ArtifactError(f"{path.name}: llama.cpp can't load it")
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        with_context: Any = llama_cpp.llama_context_default_params()
        with_context.n_ctx = context
        with_context.n_batch = with_context.n_ubatch = BATCH
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        with_context.n_threads = with_context.n_threads_batch = threads
        with_context.type_k = with_context.type_v = _TYPE_F32
        with_context.flash_attn_type = _NO_FLASH_ATTENTION
        if seen is not None:
            callback: Any = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
            self._seen = with_context.cb_eval = callback(seen)  # it has to live as long as the context
        self._context = llama_cpp.llama_init_from_model(self._model, with_context)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise ArtifactError(f"{path.name}: llama.cpp can't run it")
        self._path = path

    def close(self) -> None:
        """Frees the memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return int(self._library.llama_vocab_n_tokens(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS before every text."""
        return bool(self._library.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> str:
        """Text of the BOS token; "" when there is none."""
        return self._named(self._library.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the end token; "" when there is none."""
        return self._named(self._library.llama_vocab_eos(self._vocab))

    def _named(self, token: int) -> str:
        return self.piece(token) if token >= 0 else ""

    @property
    def template(self) -> str:
        """The Jinja template that the file carries; "" when it carries none."""
        found = self._library.llama_model_chat_template(self._model, None)
        return found.decode("utf-8", errors="replace") if found else ""

    def ends(self, token: int) -> bool:
        """Whether the file names `token` as one that ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> str:
        """The vocabulary's entry of a token."""
        return str(self._library.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    def tokens(self, text: str) -> list[int]:
        """The ids of a prompt as a server reads it: special tokens count, and a BOS is added where the file says so."""
        data = text.encode("utf-8")
        size = len(data) + 8
        buffer = (self._library.llama_token * size)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, size, True, True)
        return list(buffer[: max(count, 0)])

    def text(self, token: int) -> bytes:
        """What a token writes."""
        size = _LONGEST_PIECE
        buffer = ctypes.create_string_buffer(size)
        count = self._library.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
        return buffer.raw[: max(count, 0)]

    def log_probabilities(self, ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """What follows each of the `positions` of a row of tokens, fp32 ``[positions, words]``.

        Raises:
            ArtifactError: llama.cpp can't compute it, or what it computes is not finite.
        """
        import numpy as np

        found = np.empty((len(positions), self.words), np.float32)
        rows = {position: row for row, position in enumerate(positions)}
        self._forget()
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            with self._batch(part, start, [start + each in rows for each in range(len(part))]) as batch:
                self._decode(batch)
            for offset in range(len(part)):
                if start + offset in rows:
                    found[rows[start + offset]] = self._logits(offset)
        if not np.isfinite(found).all():
            raise ArtifactError(f"{self._path.name}: what llama.cpp computes with it is not finite")
        found -= found.max(axis=1, keepdims=True)
        found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
        return found

    def read(self, ids: Sequence[int]) -> None:
        """Reads a row of tokens for its own sake: who watches sees all of it.

        Raises:
            ArtifactError: llama.cpp can't compute it.
        """
        self._forget()
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            # With a result for each: the last layer is computed for those tokens alone that have one.
            with self._batch(part, start, [True] * len(part)) as batch:
                self._decode(batch)

    def answer(self, prompt: Sequence[int], stops: Sequence[str], longest: int) -> tuple[str, bool]:
        """The greedy answer to a prompt, and whether it ended by itself within so many tokens."""
        self._forget()
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            with self._batch(part, start, [start + each == len(prompt) - 1 for each in range(len(part))]) as batch:
                self._decode(batch)
        data = b""
        for done in range(longest):
            token = int(self._logits(-1).argmax())
            if self.ends(token):
                return data.decode("utf-8", errors="replace"), True
            data += self.text(token)
            cut = [data.index(stop.encode()) for stop in stops if stop.encode() in data]
            if cut:
                return data[: min(cut)].decode("utf-8", errors="replace"), True
            with self._batch([token], len(prompt) + done, [True]) as batch:
                self._decode(batch)
        return data.decode("utf-8", errors="replace"), False

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _logits(self, index: int) -> np.ndarray:
        import numpy as np

        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, index), (self.words,))

    @contextlib.contextmanager
    def _batch(self, ids: Sequence[int], start: int, wanted: Sequence[bool]) -> Iterator[Any]:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, (token, asked) in enumerate(zip(ids, wanted, strict=True)):
                batch.token[at], batch.pos[at], batch.logits[at] = token, start + at, asked
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            yield batch
        finally:
            self._library.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        if self._library.llama_decode(self._context, batch) != 0:
            raise ArtifactError(f"{self._path.name}: llama.cpp can't compute with it")
