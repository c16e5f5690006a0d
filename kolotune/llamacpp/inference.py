"""Text from a GGUF: token by token, with the stops that the model was trained with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ArtifactError, ToolchainError


class GgufModel:
    """A GGUF loaded by llama.cpp.

    Args:
        path: the file.
        context: tokens that prompt and answer may have together; 0: what the model was made for.

    Raises:
        ArtifactError: llama.cpp can't load it.
        ToolchainError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path, context: int = 4096) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise ToolchainError(f"llama-cpp-python can't be loaded: {error}") from None
        self._library = llama_cpp
        try:
            self._model = llama_cpp.Llama(str(path), n_ctx=context, n_gpu_layers=-1, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path}: llama.cpp can't load it: {error}") from None

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self._model.n_ctx())

    def tokens(self, text: str) -> list[int]:
        """The ids of `text` as a server reads it: special tokens count, none is added."""
        return list(self._model.tokenize(text.encode("utf-8"), add_bos=False, special=True))

    def _ends(self, token: int) -> bool:
        """Whether the GGUF names `token` as one that ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self._model._model.vocab, token))

    def generate(
        self, prompt: Sequence[int], stops: Sequence[str], *, temperature: float, max_tokens: int, seed: int
    ) -> Iterator[str]:
        """The answer, piece by piece; it ends at a stop, an end token, or `max_tokens`.

        Args:
            prompt: token ids.
            stops: texts that end the answer and are not part of it.
            temperature: 0 takes the likeliest token each time.
            max_tokens: longest answer, in tokens.
            seed: of the sampling.
        """
        self._model.set_seed(seed)
        pending = b""
        tokens = self._model.generate(list(prompt), temp=temperature, top_k=40, top_p=0.95, reset=True)
        for token in itertools.islice(tokens, max_tokens):
            if self._ends(token):
                break
            pending += self._model.detokenize([token], special=True)
            text, rest = _decoded(pending)
            at = min((text.find(stop) for stop in stops if stop in text), default=-1)
            if at >= 0:
                yield text[:at]
                return
            # What may be the beginning of a stop, or of a character, waits for the next token.
            held = max((_overlap(text, stop) for stop in stops), default=0)
            ready = text[: len(text) - held]
            if ready:
                yield ready
            pending = text[len(text) - held :].encode("utf-8") + rest
        tail = pending.decode("utf-8", errors="replace")
        if tail:
            yield tail


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The text of `data` and the bytes of a character that is not complete yet."""
    for cut in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - cut].decode("utf-8"), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", errors="replace"), b""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
