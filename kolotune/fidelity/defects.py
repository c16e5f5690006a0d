"""What a comparison finds wrong and what it leaves out: values with a kind, and the sentences that describe them.

Measuring and judging work with kinds and facts. A sentence is made only where a comparison is written or shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

Fact = str | int | float


class DefectKind(StrEnum):
    """What is wrong with an artifact of a run."""

    END_NOT_TRAINED = "end-not-trained"
    CHAT_REFUSED = "chat-refused"
    PROMPT_REFUSED = "prompt-refused"
    CHATS_DIFFER = "chats-differ"
    FIRST_PROMPT_DIFFERS = "first-prompt-differs"
    LOSS_DIFFERS = "loss-differs"
    NOT_MEASURABLE = "not-measurable"
    WEIGHTS_MISSING = "weights-missing"
    PROMPTS_DIFFER = "prompts-differ"
    VOCABULARY_MOVED = "vocabulary-moved"
    END_TOKEN_DIFFERS = "end-token-differs"
    OVER_BOUND = "over-bound"
    GAIN_LOST = "gain-lost"
    GAIN_LOST_HERE = "gain-lost-here"
    ENDS_MISSED = "ends-missed"
    MODELFILE_UNREADABLE = "modelfile-unreadable"
    FROM_DIFFERS = "from-differs"
    STOP_MISSING = "stop-missing"
    SYSTEM_DIFFERS = "system-differs"
    NEVER_ENDS = "never-ends"


class NoteKind(StrEnum):
    """Why a comparison covers less than it could."""

    TEXTS_MISSING = "texts-missing"
    PROMPTS_NOT_SERVABLE = "prompts-not-servable"
    READ_BY_LAYER = "read-by-layer"
    TURNS_NOT_SERVABLE = "turns-not-servable"
    TRAITS_DIFFER = "traits-differ"
    OWN_RENDERER = "own-renderer"
    NOTHING_HELD_OUT = "nothing-held-out"
    NO_RECORDED_LOSS = "no-recorded-loss"
    SAMPLE_CHATS = "sample-chats"
    QUANTIZATION_NOT_MEASURED = "quantization-not-measured"


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong; `facts` are the values in its sentence, which `str` makes, without a full stop."""

    kind: DefectKind
    facts: dict[str, Fact] = field(default_factory=dict)

    def __str__(self) -> str:
        return _DEFECTS[self.kind].format(**self.facts)


@dataclass(frozen=True)
class Note:
    """One thing that was not compared; see `Defect` for its facts and its sentence."""

    kind: NoteKind
    facts: dict[str, Fact] = field(default_factory=dict)

    def __str__(self) -> str:
        return _NOTES[self.kind].format(**self.facts)


def defect(kind: DefectKind, **facts: Fact) -> Defect:
    """Return a defect with the facts that its sentence needs."""
    return Defect(kind, facts)


def note(kind: NoteKind, **facts: Fact) -> Note:
    """Return a note with the facts that its sentence needs."""
    return Note(kind, facts)


_DEFECTS = {
    DefectKind.END_NOT_TRAINED: "{count} of {of} chats are not trained to end with {token!r}",
    DefectKind.CHAT_REFUSED: "the trained template refuses a chat that was trained on: {reason}",
    DefectKind.PROMPT_REFUSED: "the trained template refuses the prompt of a chat: {reason}",
    DefectKind.CHATS_DIFFER: "{count} of {of} chats now get different tokens or loss masks than in training",
    DefectKind.FIRST_PROMPT_DIFFERS: "a prompt gets different tokens than those before the trained answer",
    DefectKind.LOSS_DIFFERS: "the {model} model's loss is {loss:.4f}, but training measured {recorded:.4f}",
    DefectKind.NOT_MEASURABLE: "{reason}",
    DefectKind.WEIGHTS_MISSING: "{reason}",
    DefectKind.PROMPTS_DIFFER: "{count} of {of} prompts get different tokens than in training: {reason}",
    DefectKind.VOCABULARY_MOVED: "vocabulary entry {piece!r} is token {index}, but was token {expected} in training",
    DefectKind.END_TOKEN_DIFFERS: "its answers end with {token!r}, but ended with {expected!r} in training",
    DefectKind.OVER_BOUND: "{figure} {value:.2g} exceeds its bound of {bound:.2g}",
    DefectKind.GAIN_LOST: "it keeps {kept:.0%} of what training gained, less than the {bound:.0%} that are required",
    DefectKind.GAIN_LOST_HERE: (
        "it keeps {kept:.0%} of what training gained, less than the {bound:.0%} that are required; "
        "{keeping} keeps {keeping_kept:.0%}"
    ),
    DefectKind.ENDS_MISSED: "only {count} of {of} answers end where they should",
    DefectKind.MODELFILE_UNREADABLE: "{reason}",
    DefectKind.FROM_DIFFERS: "FROM names {path}, not {expected}",
    DefectKind.STOP_MISSING: "no stop for {token!r}, the token that ends answers in training",
    DefectKind.SYSTEM_DIFFERS: "SYSTEM is not the system prompt of the run",
    DefectKind.NEVER_ENDS: "none of {of} answers ends, although all of them end with the adapter on its base",
}
_NOTES = {
    NoteKind.TEXTS_MISSING: "the texts of the chats are no longer available, so the prompts were not compared",
    NoteKind.PROMPTS_NOT_SERVABLE: (
        "{count} chats can't be served with the tokens they were trained with (`prepare` reported them); "
        "their prompts were not compared"
    ),
    NoteKind.READ_BY_LAYER: (
        "the model does not fit into free memory in fp32: it was read layer by layer, and no answers were generated"
    ),
    NoteKind.TURNS_NOT_SERVABLE: (
        "{count} prompts have turns that a TEMPLATE can't write as they were trained (`modelfile` reported this); "
        "they were not compared as served"
    ),
    NoteKind.TRAITS_DIFFER: (
        "llama.cpp's server writes prompts that the chats do not have differently from the trained template: {traits}"
    ),
    NoteKind.OWN_RENDERER: "Ollama renders this architecture in code of its own, which was not asked for its prompts",
    NoteKind.NOTHING_HELD_OUT: "no chats are held out: the first training chats were compared",
    NoteKind.NO_RECORDED_LOSS: "training measured no held-out loss, so base and adapter were not checked against one",
    NoteKind.SAMPLE_CHATS: "the model was trained elsewhere: kolotune's starter chats were compared",
    NoteKind.QUANTIZATION_NOT_MEASURED: "{name} could not be measured: {reason}",
}
