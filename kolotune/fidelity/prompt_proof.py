"""Does a server put the same tokens before an answer as training did? Asked prompt by prompt.

A server is anything that writes a prompt and tokenizes it: llama.cpp's own, or Ollama's TEMPLATE as we render it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.typed_storage import JsonObject

_BEFORE, _AFTER = 40, 60  # characters of a text that are shown around a difference
_PIECES_BEFORE, _PIECES_AFTER = 3, 5
_SPACE = "\u2581"  # SentencePiece's


class Outcome(StrEnum):
    """What became of a prompt."""

    EQUAL = "equal"
    DIFFERENT = "different"
    SERVER_REFUSES = "server-refuses"
    TRAINING_REFUSES = "training-refuses"
    BOTH_REFUSE = "both-refuse"


class MismatchKind(StrEnum):
    """Why the tokens of a prompt differ from training's."""

    TEMPLATE = "template"
    BOS = "bos"
    ANSWER_MERGES = "answer-merges"
    COMPOSED_FORM = "composed-form"
    COMPATIBILITY_FORM = "compatibility-form"
    FIRST_SPACE = "first-space"
    TOKENS = "tokens"

    @property
    def sentence(self) -> str:
        """The cause, without a full stop."""
        return _CAUSES[self]


_CAUSES = {
    MismatchKind.TEMPLATE: "the server renders the chat template differently",
    MismatchKind.BOS: "one of the two has a BOS token at the beginning",
    MismatchKind.ANSWER_MERGES: "in training, the prompt's last token contains the first characters of the answer",
    MismatchKind.COMPOSED_FORM: "the tokenizer composes accented letters (NFC), llama.cpp reads them as they are",
    MismatchKind.COMPATIBILITY_FORM: "the tokenizer replaces ligatures and the like (NFKC), llama.cpp does not",
    MismatchKind.FIRST_SPACE: "llama.cpp puts SentencePiece's space in front of texts where the tokenizer does not",
    MismatchKind.TOKENS: "llama.cpp splits the text into other tokens",
}


@dataclass(frozen=True)
class Prompt:
    """What stands before an answer, and the tokens that training has there.

    Attributes:
        messages, tools: the turns and tools before the answer, as templates get them.
        text: rendered by the trained template, with the answer opened.
        ids: its tokens.
        plain: Ollama's TEMPLATE can write all of it.
        name: of the trait that it has; "" for a prompt of a chat.
        refusal: why training refuses it; then there are neither text nor tokens.
        merges: the text alone gets other tokens than these: the last one contains characters of the answer.
        is_normalized: the tokenizer changes the text before it encodes it.
        switches: values of the variables that a request may set (``--template-switch``).
    """

    messages: list[JsonObject]
    tools: list[JsonObject]
    text: str = ""
    ids: list[int] = field(default_factory=list)
    plain: bool = False
    name: str = ""
    refusal: str = ""
    merges: bool = False
    is_normalized: bool = False
    switches: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """What a server is asked for.

    Attributes:
        prompts: of the compared chats.
        probes: more prompts, for checking what is served.
        battery: a prompt for each trait of chats.
        pieces: the vocabulary by token id; None where an entry can't be compared.
        bos: text of the tokenizer's BOS; "" for none.
    """

    prompts: Sequence[Prompt]
    probes: Sequence[Prompt]
    battery: Sequence[Prompt]
    pieces: Sequence[str | None]
    bos: str


@dataclass(frozen=True)
class Mismatch:
    """Where a served prompt first differs from the trained one: both texts, or both tokens, around that position."""

    kind: MismatchKind
    trained: str
    served: str

    def __str__(self) -> str:
        return f"{self.trained!r} in training, {self.served!r} when served"


@dataclass(frozen=True)
class PromptResult:
    """What a server made of a prompt.

    Attributes:
        name: see `Prompt`.
        mismatch: None unless the outcome is that they differ.
        reason: of a refusal.
    """

    name: str
    outcome: Outcome
    mismatch: Mismatch | None = None
    reason: str = ""


class Server(Protocol):
    """What writes and tokenizes prompts."""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        /,
        **switches: bool,
    ) -> str:
        """Return the prompt, with the answer opened; raise a `KolotuneError` to refuse the messages."""

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt."""


def ask(
    prompts: Sequence[Prompt], server: Server, pieces: Sequence[str | None], bos: str = ""
) -> Iterator[PromptResult]:
    """Yield what a server makes of each prompt.

    Args:
        prompts: as trained.
        server: the server.
        pieces: the vocabulary by token id.
        bos: the tokenizer's BOS, which a server may leave out of the text and add as a token; "" for none.
    """
    for prompt in prompts:
        try:
            text = server.render(prompt.messages, prompt.tools or None, **prompt.switches)
            ids = server.tokens(text)
        except KolotuneError as error:
            outcome = Outcome.BOTH_REFUSE if prompt.refusal else Outcome.SERVER_REFUSES
            yield PromptResult(prompt.name, outcome, reason=error.cause)
            continue
        if prompt.refusal:
            yield PromptResult(prompt.name, Outcome.TRAINING_REFUSES, reason=prompt.refusal)
        elif ids == prompt.ids:
            yield PromptResult(prompt.name, Outcome.EQUAL)
        else:
            yield PromptResult(prompt.name, Outcome.DIFFERENT, _mismatch(prompt, text, ids, pieces, bos))


def mismatch_of_tokens(trained: Sequence[int], served: Sequence[int], pieces: Sequence[str | None]) -> Mismatch:
    """Return where llama.cpp splits a text into other tokens than training."""
    before, after = ([_piece(pieces, index) for index in sequence] for sequence in (trained, served))
    start = _first_difference(trained, served)
    around = slice(max(0, start - _PIECES_BEFORE), start + _PIECES_AFTER)
    kind = MismatchKind.TOKENS
    if _is_first_space(before[start : start + 1], after[start : start + 1]):
        kind = MismatchKind.FIRST_SPACE
    return Mismatch(kind, " ".join(before[around]), " ".join(after[around]))


def _mismatch(prompt: Prompt, text: str, ids: Sequence[int], pieces: Sequence[str | None], bos: str) -> Mismatch:
    trained_text = prompt.text.removeprefix(bos)
    served_text = text.removeprefix(bos)
    if trained_text != served_text:
        start = _first_difference(trained_text, served_text)
        around = slice(max(0, start - _BEFORE), start + _AFTER)
        return Mismatch(MismatchKind.TEMPLATE, trained_text[around], served_text[around])
    trained, served = ([_piece(pieces, index) for index in sequence] for sequence in (prompt.ids, ids))
    start = _first_difference(prompt.ids, ids)
    around = slice(max(0, start - _PIECES_BEFORE), start + _PIECES_AFTER)
    kind = _kind(prompt, ids, trained[start : start + 1], served[start : start + 1])
    return Mismatch(kind, " ".join(trained[around]), " ".join(served[around]))


def _kind(prompt: Prompt, ids: Sequence[int], trained: list[str], served: list[str]) -> MismatchKind:
    if prompt.ids[1:] == ids or prompt.ids == ids[1:]:
        return MismatchKind.BOS
    if prompt.merges:
        return MismatchKind.ANSWER_MERGES
    if prompt.is_normalized and not unicodedata.is_normalized("NFC", prompt.text):
        return MismatchKind.COMPOSED_FORM
    if prompt.is_normalized and not unicodedata.is_normalized("NFKC", prompt.text):
        return MismatchKind.COMPATIBILITY_FORM
    return MismatchKind.FIRST_SPACE if _is_first_space(trained, served) else MismatchKind.TOKENS


def _is_first_space(trained: list[str], served: list[str]) -> bool:
    return trained != served and any(_SPACE in piece[:1] for piece in (*trained, *served))


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _piece(pieces: Sequence[str | None], index: int) -> str:
    piece = pieces[index] if index < len(pieces) else None
    return str(index) if piece is None else piece
