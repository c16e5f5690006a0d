"""What differs between the prompts of a server and those of training, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from kolotune.fidelity.prompt_proof import MismatchKind, Outcome, Prompt, PromptResult, ask
from kolotune.foundation.errors import TemplateError

PIECES = ["<s>", "a", "b", "\u2581a", "\u2581", "\u0308"]
PROMPT = Prompt([{"role": "user", "content": "a"}], [], "<s>ab", [0, 1, 2], name="question")


@dataclass
class Server:
    """Answers with what it was given."""

    text: str = "ab"
    ids: list[int] = field(default_factory=lambda: [0, 1, 2])
    refusal: str = ""

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
    ) -> str:
        if self.refusal:
            raise TemplateError(self.refusal)
        return self.text

    def tokens(self, text: str) -> list[int]:
        return self.ids


def result(server: Server, prompt: Prompt = PROMPT) -> PromptResult:
    (only,) = ask([prompt], server, PIECES, "<s>")
    return only


def test_equal() -> None:
    assert result(Server()) == PromptResult("question", Outcome.EQUAL)


@pytest.mark.parametrize(
    ("refusal", "server", "outcome"),
    [
        ("no tools", Server(), Outcome.TRAINING_REFUSES),
        ("no tools", Server(refusal="never"), Outcome.BOTH_REFUSE),
        ("", Server(refusal="never"), Outcome.SERVER_REFUSES),
    ],
)
def test_refusals(refusal: str, server: Server, outcome: Outcome) -> None:
    asked = result(server, replace(PROMPT, refusal=refusal))
    assert asked.outcome == outcome and asked.mismatch is None
    assert asked.reason == (server.refusal or refusal)


@pytest.mark.parametrize(
    ("prompt", "server", "kind"),
    [
        (PROMPT, Server(text="<s>ab c", ids=[0, 1, 2, 3]), MismatchKind.TEMPLATE),
        (PROMPT, Server(ids=[1, 2]), MismatchKind.BOS),
        (PROMPT, Server(text="<s>ab", ids=[0, 0, 1, 2]), MismatchKind.BOS),
        (replace(PROMPT, merges=True), Server(ids=[0, 1, 1]), MismatchKind.ANSWER_MERGES),
        (
            replace(PROMPT, text="<s>ba\u0308", is_normalized=True),
            Server(text="ba\u0308", ids=[0, 1, 2, 5]),
            MismatchKind.COMPOSED_FORM,
        ),
        (PROMPT, Server(ids=[0, 3, 2]), MismatchKind.FIRST_SPACE),
        (PROMPT, Server(ids=[0, 2, 1]), MismatchKind.TOKENS),
    ],
)
def test_kinds(prompt: Prompt, server: Server, kind: MismatchKind) -> None:
    asked = result(server, prompt)
    assert asked.outcome == Outcome.DIFFERENT and asked.mismatch is not None
    assert asked.mismatch.kind == kind


def test_both_are_shown_around_the_place() -> None:
    long = "x" * 500
    text = result(Server(f"{long}y{long}", [1]), replace(PROMPT, text=f"<s>{long}z{long}")).mismatch
    assert text is not None
    assert (text.trained, text.served) == (f"{'x' * 40}z{'x' * 59}", f"{'x' * 40}y{'x' * 59}")
    tokens = result(Server(ids=[0, 1, 2, 1]), replace(PROMPT, ids=[0, 1, 2, 9])).mismatch
    assert tokens is not None and (tokens.trained, tokens.served) == ("<s> a b 9", "<s> a b a")
