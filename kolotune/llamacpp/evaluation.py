"""Evaluate a GGUF with llama.cpp as exactly as it can: log-probabilities, greedy answers, tokens.

It runs on the CPU, with attention's keys and values in fp32 and without flash attention, so that differences come from
the weights. Text as a server generates it comes from `model_server`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
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
_GUESSED_AGAIN = 6  # tokens; an answer that has left a guess may leave it again


class ExactGguf:
    """A GGUF loaded for measuring.

    Args:
        path: the file.
        context: length of the longest sequence to read, in tokens.
        on_tensor: llama.cpp's evaluation callback: ``(address of a tensor, whether it is a question, None)``.
        threads: that compute; 0 for all cores.

    Raises:
        ArtifactError: llama.cpp can't load it.
        ToolchainError: llama.cpp's library is missing or can't be used.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        on_tensor: Callable[[int, bool, object], bool] | None = None,
        threads: int = 0,
    ) -> None:
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
        context_parameters.n_threads = context_parameters.n_threads_batch = threads or _all_cores()
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
        self._held: list[int] = []  # the sequence whose keys and values are in memory

    def close(self) -> None:
        """Free the memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def use_all_cores(self) -> None:
        """Compute with all cores from now on, whatever number of threads was given."""
        self._library.llama_set_n_threads(self._context, _all_cores(), _all_cores())

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
        exponentials = np.empty(self.vocabulary_size, np.float32)
        indexes = {position: index for index, position in enumerate(positions)}
        for position, logits in self._compute(ids, indexes):  # row by row: each stays in the processor's cache
            row = result[indexes[position]]
            np.subtract(logits, logits.max(), out=row)
            total = np.exp(row, out=exponentials).sum()
            if not (np.isfinite(total) and np.isfinite(row.min())):
                raise ArtifactError(f"{self._path.name}: llama.cpp's results for it are not finite")
            row -= np.log(total)
        return result

    def read(self, ids: Sequence[int]) -> None:
        """Compute a whole sequence only for the `on_tensor` callback.

        Raises:
            ArtifactError: llama.cpp can't compute it.
        """
        for _ in self._compute(ids, range(len(ids))):
            # Ask for results of all tokens: the last layer is computed only for tokens whose results are needed.
            pass

    def answer(
        self, prompt: Sequence[int], stops: Sequence[str], longest: int, guess: Sequence[int] = ()
    ) -> tuple[str, bool]:
        """Return the greedy answer to a prompt, and whether it ended within `longest` tokens.

        Args:
            prompt: its tokens.
            stops: texts that end the answer.
            longest: the answer's most tokens.
            guess: tokens that the answer may begin with; those that it does are computed together instead of one by
                one (speculative decoding: Leviathan, Kalman, Matias, 2023).
        """
        data = b""
        for token in itertools.islice(self._greedy_tokens(prompt, guess[:longest]), longest):
            if self.is_end(token):
                return data.decode("utf-8", errors="replace"), True
            data += self.text(token)
            ends = [data.index(stop.encode()) for stop in stops if stop.encode() in data]
            if ends:
                return data[: min(ends)].decode("utf-8", errors="replace"), True
        return data.decode("utf-8", errors="replace"), False

    def _greedy_tokens(self, prompt: Sequence[int], guess: Sequence[int]) -> Iterator[int]:
        """Yield the tokens of the greedy answer, without end."""
        ids = [*prompt]
        while True:
            first = len(ids) - 1
            tokens = [
                int(logits.argmax())
                for _, logits in self._compute([*ids, *guess], range(first, first + 1 + len(guess)))
            ]
            for number, token in enumerate(tokens):
                yield token
                ids.append(token)
                if guess[number : number + 1] != [token]:
                    guess = _guess_behind(token, guess[number:])
                    break

    def _compute(self, ids: Sequence[int], needed: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Compute a sequence; yield the needed positions with their logits, which the next step overwrites.

        What it begins with is not computed again where the last sequence began with the same, nor what follows the last
        needed position at all.
        """
        ids = list(ids[: max(needed) + 1])
        begin = self._keep(ids[: min(needed)])
        for start in range(begin, len(ids), BATCH):
            part = ids[start : start + BATCH]
            with self._batch(part, start, [start + offset in needed for offset in range(len(part))]) as batch:
                self._decode(batch)
            self._held = ids[: start + len(part)]
            for offset in range(len(part)):
                if start + offset in needed:
                    yield start + offset, self._logits(offset)

    def _keep(self, ids: Sequence[int]) -> int:
        """Remove from memory what does not belong to a sequence; return how many of its tokens stay."""
        pairs = enumerate(zip(ids, self._held, strict=False))
        common = next((at for at, (one, held) in pairs if one != held), min(len(ids), len(self._held)))
        memory = self._library.llama_get_memory(self._context)
        # A model with a recurrent state can't go back to a part of a sequence.
        if not common or not self._library.llama_memory_seq_rm(memory, 0, common, -1):
            self._library.llama_memory_clear(memory, True)
            common = 0
        self._held = list(ids[:common])
        return common

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


def _guess_behind(token: int, guess: Sequence[int]) -> Sequence[int]:
    """Return how an answer may continue behind a token in which it left the guess: as if others were left out."""
    at = guess.index(token) if token in guess else 0
    return list(guess[at + 1 : at + 1 + _GUESSED_AGAIN])


def _all_cores() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
