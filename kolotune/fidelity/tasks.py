"""What the measuring processes are asked, and the files in which they answer.

`ModelsTask` asks for everything that is computed with transformers: the base, the adapter on it, the merged model.
It leaves a `Reference`, which every `GgufTask` is given. Log-probabilities are kept between them as ``.npy`` files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kolotune.foundation.typed_storage import JsonObject


@dataclass(frozen=True)
class ModelsTask:
    """Paths as text; "" where there is none.

    Attributes:
        base, adapter, merged: folders.
        tokenizer: folder with the trained tokenizer and template.
        tokens: the prepared tokens of the compared part; chats: the same chats as JSON lines, "" to take them from
            the training data.
        train_data: files of chats, for a run that holds nothing out.
        most_chats, most_tokens: limits of what is compared.
        prompts: the user's own, in place of those of the held-out chats.
        answers, longest_answer: how many prompts are answered, and how long.
        scratch: folder for what is left behind.
    """

    base: str
    adapter: str
    merged: str
    tokenizer: str
    tokens: str
    chats_file: str
    train_data: list[str]
    most_chats: int
    most_tokens: int
    own_prompts: list[str]
    system: str
    most_answers: int
    longest_answer: int
    scratch: str


@dataclass(frozen=True)
class ComparedChat:
    """One compared chat.

    Attributes:
        ids: its tokens, as prepared.
        positions: the index before each labelled token; what is likely there is measured.
        ends: indices into `positions` at which the end token has to come.
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Prompt:
    """What stands before an answer.

    Attributes:
        messages: the turns before it.
        text, ids: as the trained template and tokenizer write it.
        plain: Ollama's TEMPLATE has a place for all of it.
    """

    messages: list[JsonObject]
    tools: list[JsonObject]
    text: str
    ids: list[int]
    plain: bool


@dataclass(frozen=True)
class GreedyAnswer:
    """One greedy answer and whether it ended by itself; `expected` is what the chat has there, if it is one."""

    messages: list[JsonObject]
    ids: list[int]
    base: str | None
    tuned: str | None
    ended: bool
    expected: str | None


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; None or 0 where it was not.

    Attributes:
        wrong: what is wrong beyond the figures, a sentence each.
    """

    loss: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    stops: int = 0
    prompts_equal: int = 0
    prompts: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What the tuned model does, and what the GGUFs are held against.

    Attributes:
        chats, prompts, answers: see there. probes: more prompts, for what is served.
        chat_losses: base and tuned, summed over each chat's labels.
        labels: labelled tokens of each chat.
        stops: ends at which the reference's likeliest token is the end token, as (chat, index into its positions).
        held_out: False when training chats were taken; whole: all held-out chats are among the compared ones.
        prepared_equal, prepared_chats: chats whose tokens and labels come out again as they were prepared.
        wrong_prepared, wrong_tokens: what is wrong with the prepared part, a sentence each.
        end_token, pieces: its text; the vocabulary by id, None where there is no plain entry.
        merged: its figures; None when there is no merged model.
        base_loss, tuned_loss: means over all labels.
        notes: what was left out, a sentence each.
    """

    chats: list[ComparedChat]
    prompts: list[Prompt]
    probes: list[Prompt]
    answers: list[GreedyAnswer]
    chat_losses: list[list[float]]
    labels: list[int]
    stops: list[list[int]]
    held_out: bool
    whole: bool
    prepared_equal: int
    prepared_chats: int
    wrong_prepared: list[str]
    end_token: str
    pieces: list[str | None]
    base_loss: float
    tuned_loss: float
    merged: Figures | None
    notes: list[str]


@dataclass(frozen=True)
class GgufTask:
    """One GGUF and its Modelfile.

    Attributes:
        gguf: the file.
        modelfile: "" when it is not asked for.
        reference: a `Reference`'s file.
        before: log-probabilities that it is held against; after: where its own are left, "" for nowhere.
        system: what the Modelfile should have as SYSTEM.
        longest_answer: in tokens.
    """

    gguf: str
    modelfile: str
    reference: str
    before: str
    after: str
    system: str
    longest_answer: int
    answer_file: str


@dataclass(frozen=True)
class GgufMeasurement:
    """What came of a `GgufTask`.

    Attributes:
        figures: of the file.
        served_equal, served_prompts: prompts that are served with the ids that were trained on.
        served_ended, served_answers: answers that end, of those that end in the reference.
        wrong_served: a sentence each.
        notes: what was left out.
    """

    figures: Figures
    served_equal: int = 0
    served_prompts: int = 0
    served_ended: int = 0
    served_answers: int = 0
    wrong_served: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
