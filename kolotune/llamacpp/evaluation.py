"""Evaluate a GGUF with llama.cpp as exactly as it can: log-probabilities, greedy answers, tokens.

It runs on the CPU, with attention's keys and values in fp32 and without flash attention, so that differences come from
the weights. Text as a server generates it comes from `model_server`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError

from . import library
from .log import print_only_problems

if TYPE_CHECKING:
    import numpy as np

BATCH = 256
"""Tokens that are computed together."""

_LONGEST_PIECE = 4096


class ExactGguf:
    """A GGUF loaded for measuring.

    Args:
        path: the file.
        context: length of the longest sequence to read, in tokens.
        on_tensor: llama.cpp's evaluation callback: ``(address of a tensor, whether it is a question, None)``.

    Raises:
        ArtifactError: llama.cpp can't load it.
        ToolchainError: llama.cpp's library is missing or can't be used.
    """

    def __init__(self, path: Path, context: int, on_tensor: Callable[[int, bool, object], bool] | None = None) -> None:
        self._library = library.load()
        print_only_problems()
        self._library.llama_backend_init()
        model_parameters = self._library.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), model_parameters)
        if not self._model:
            raise ArtifactError(f"{path.name}: llama.cpp can't load it")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        context_parameters = self._library.llama_context_default_params()
        context_parameters.n_ctx = context
        context_parameters.n_batch = context_parameters.n_ubatch = BATCH
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        context_parameters.n_threads = context_parameters.n_threads_batch = threads
        context_parameters.type_k = context_parameters.type_v = library.F32
        context_parameters.flash_attn_type = library.NO_FLASH_ATTENTION
        if on_tensor is not None:
            self._callback = library.EvaluationCallback(on_tensor)  # must live as long as the context
            context_parameters.cb_eval = ctypes.cast(self._callback, ctypes.c_void_p)
        self._context = self._library.llama_init_from_model(self._model, context_parameters)
        if not self._context:
            self._library.llama_model_free(self._model)
            raise ArtifactError(f"{path.name}: llama.cpp can't run it")
        self._path = path

    def close(self) -> None:
        """Free the memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._library.llama_vocab_n_tokens(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer adds a BOS to every text."""
        return bool(self._library.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> str:
        """Text of the BOS token; "" when there is none."""
        return self._piece_or_empty(self._library.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the end token; "" when there is none."""
        return self._piece_or_empty(self._library.llama_vocab_eos(self._vocab))

    def _piece_or_empty(self, token: int) -> str:
        return self.piece(token) if token >= 0 else ""

    @property
    def template(self) -> str:
        """The Jinja template in the file; "" when there is none."""
        template = self._library.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", errors="replace") if template else ""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer, according to the file."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> str:
        """Return the vocabulary's entry for a token."""
        return str(self._library.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    def tokens(self, text: str) -> list[int]:
        """Tokenize a prompt as a server does: special tokens are recognised, and a BOS is added if the file says so."""
        data = text.encode("utf-8")
        size = len(data) + 8
        buffer = (ctypes.c_int32 * size)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, size, True, True)
        return list(buffer[: max(count, 0)])

    def text(self, token: int) -> bytes:
        """Return the text of a token, as bytes."""
        size = _LONGEST_PIECE
        buffer = ctypes.create_string_buffer(size)
        count = self._library.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
        return buffer.raw[: max(count, 0)]

    def log_probabilities(self, ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Return the distributions of the next token at some positions of a sequence.

        Args:
            ids: the sequence.
            positions: in the sequence.

        Returns:
            fp32 ``[positions, vocabulary]``.

        Raises:
            ArtifactError: llama.cpp can't compute it, or what it computes is not finite.
        """
        import numpy as np

        result = np.empty((len(positions), self.vocabulary_size), np.float32)
        indexes = {position: index for index, position in enumerate(positions)}
        self._clear()
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            with self._batch(part, start, [start + offset in indexes for offset in range(len(part))]) as batch:
                self._decode(batch)
            for offset in range(len(part)):
                if start + offset in indexes:
                    result[indexes[start + offset]] = self._logits(offset)
        if not np.isfinite(result).all():
            raise ArtifactError(f"{self._path.name}: llama.cpp's results for it are not finite")
        result -= result.max(axis=1, keepdims=True)
        result -= np.log(np.exp(result).sum(axis=1, keepdims=True))
        return result

    def read(self, ids: Sequence[int]) -> None:
        """Compute a sequence only for the `on_tensor` callback.

        Raises:
            ArtifactError: llama.cpp can't compute it.
        """
        self._clear()
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            # Ask for results of all tokens: the last layer is computed only for tokens whose results are needed.
            with self._batch(part, start, [True] * len(part)) as batch:
                self._decode(batch)

    def answer(self, prompt: Sequence[int], stops: Sequence[str], longest: int) -> tuple[str, bool]:
        """Return the greedy answer to a prompt, and whether it ended within `longest` tokens."""
        self._clear()
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            with self._batch(part, start, [start + offset == len(prompt) - 1 for offset in range(len(part))]) as batch:
                self._decode(batch)
        data = b""
        for count in range(longest):
            token = int(self._logits(-1).argmax())
            if self.is_end(token):
                return data.decode("utf-8", errors="replace"), True
            data += self.text(token)
            ends = [data.index(stop.encode()) for stop in stops if stop.encode() in data]
            if ends:
                return data[: min(ends)].decode("utf-8", errors="replace"), True
            with self._batch([token], len(prompt) + count, [True]) as batch:
                self._decode(batch)
        return data.decode("utf-8", errors="replace"), False

    def _clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _logits(self, index: int) -> np.ndarray:
        import numpy as np

        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, index), (self.vocabulary_size,))

    @contextlib.contextmanager
    def _batch(self, ids: Sequence[int], start: int, needs_result: Sequence[bool]) -> Iterator[Any]:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, (token, needed) in enumerate(zip(ids, needs_result, strict=True)):
                batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, needed
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            yield batch
        finally:
            self._library.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        if self._library.llama_decode(self._context, batch) != 0:
            raise ArtifactError(f"{self._path.name}: llama.cpp can't compute with it")
