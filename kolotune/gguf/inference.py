"""Generate text from a GGUF token by token, with the stops that the model was trained with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from kolotune.foundation.errors import ArtifactError, ToolchainError

from . import header


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling other than the temperature; these defaults change little."""

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass
class GeneratedAnswer:
    """An answer while it is generated.

    Attributes:
        pieces: its text; iterate over it once.
        tokens: number of tokens so far, including an end token or a stop.
        reason: why it ended, once it has: "stop", or "length" for `max_tokens`.
    """

    pieces: Iterator[str] = field(default_factory=lambda: iter(()))
    tokens: int = 0
    reason: Literal["stop", "length"] = "length"

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class GgufModel:
    """A GGUF loaded by llama.cpp.

    Args:
        path: the file.
        context: tokens of prompt and answer together; 0, or more than the model's own limit, stands for that limit.
        repeat_last_n: number of latest tokens that the repetition penalties consider.

    Attributes:
        context: tokens of prompt and answer together.

    Raises:
        ArtifactError: it is not a whole GGUF, or llama.cpp can't load it.
        ToolchainError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path, context: int = 4096, repeat_last_n: int = 64) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise ToolchainError(f"llama-cpp-python can't be loaded: {error}") from None
        self._library = llama_cpp
        summary = header.read(path)
        limit = summary.integer(f"{summary.architecture}.context_length", context)
        self.context = min(context or limit, limit)
        try:
            self._model = llama_cpp.Llama(
                str(path), n_ctx=self.context, n_gpu_layers=-1, last_n_tokens_size=repeat_last_n, verbose=False
            )
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path}: llama.cpp can't load it: {error}") from None
        self.context = self.context or int(self._model.n_ctx())

    def tokens(self, text: str) -> list[int]:
        """Tokenize `text` as a server does: special tokens are recognised, and none is added."""
        return list(self._model.tokenize(text.encode("utf-8"), add_bos=False, special=True))

    def _is_end(self, token: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._model._model.vocab, token))

    def generate(
        self,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        sampling: Sampling | None = None,
    ) -> GeneratedAnswer:
        """Generate an answer; it ends at a stop, an end token, or `max_tokens`.

        Args:
            prompt: token ids.
            stops: texts that end the answer and are not part of it.
            temperature: 0 chooses the likeliest token each time.
            max_tokens: longest answer, in tokens.
            seed: of the sampling.
            sampling: further settings.
        """
        answer = GeneratedAnswer()
        self._model.set_seed(seed)
        tokens = self._model.generate(list(prompt), temp=temperature, reset=True, **asdict(sampling or Sampling()))
        answer.pieces = self._pieces(answer, itertools.islice(tokens, max_tokens), stops)
        return answer

    def _pieces(self, answer: GeneratedAnswer, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        pending = b""
        for token in tokens:
            answer.tokens += 1
            if self._is_end(token):
                answer.reason = "stop"
                break
            pending += self._model.detokenize([token], special=True)
            text, rest = _decoded(pending)
            position = min((text.find(stop) for stop in stops if stop in text), default=-1)
            if position >= 0:
                answer.reason = "stop"
                if position:
                    yield text[:position]
                return
            # The start of a possible stop, or of a character, waits for the next token.
            held_back = max((_overlap(text, stop) for stop in stops), default=0)
            ready = text[: len(text) - held_back]
            if ready:
                yield ready
            pending = text[len(text) - held_back :].encode("utf-8") + rest
        tail = pending.decode("utf-8", errors="replace")
        if tail:
            yield tail


def _decoded(data: bytes) -> tuple[str, bytes]:
    """Return the text of `data`, and the bytes of a last character that is not complete."""
    for cut in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - cut].decode("utf-8"), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", errors="replace"), b""


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the start of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
