"""The tasks of the measuring processes, and their results.

A `ModelsTask` covers everything that transformers computes: the base, the adapter on it, the merged model. It leaves a
`Reference`, which every `GgufTask` reads, and log-probabilities in ``.npy`` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.traits import ChatTrait
from kolotune.foundation.typed_storage import JsonObject

from .adapter_place import GgufPlace
from .comparison import MatrixSurvival
from .defects import Defect, Note
from .general_figures import GeneralFigures
from .prompt_proof import Prompt, PromptResult, PromptSet

REFERENCE_FILE, TUNED_FILE, MERGED_FILE = "reference.json", "tuned.npy", "merged.npy"
CHANGES_FILE = "changes.safetensors"
"""Files that a `ModelsTask` leaves in its scratch folder."""


@dataclass(frozen=True)
class ModelsTask:
    """Measure base, adapter and merged model. Paths are text; "" where there is none.

    Attributes:
        base, adapter, merged: folders. Without an adapter the base itself is the reference.
        base_sha256: hash of the base's content; "" without an adapter.
        tokenizer: folder with the trained tokenizer and template.
        tokens: file with the prepared tokens of the compared chats; "" to compare on those in `train_data`.
        chats_file: the same chats as JSON lines; "" to find their texts in `train_data`.
        train_data: files of chats, for a run that holds none out, or a model that was trained elsewhere.
        reading: what the user decided about reading them.
        most_chats, most_tokens: limits of what is compared.
        own_prompts: the user's prompts, answered in place of those in the chats.
        system: the system prompt of the run.
        most_answers, longest_answer: how many prompts are answered, and how long an answer may be, in tokens.
        scratch: folder for the files that are left.
        learns_empty_thoughts: whether the loss of the prepared tokens falls on empty thoughts.
        places: where the GGUF has the base's weights, by their stored names; empty where that is not known.
        general_tokens: how many tokens of the general set's prose are measured; 0 for none.
        general_answers: whether the general set's questions are asked.
        is_packed: whether the packed passes are proven to compute the base as transformers does.
        ggufs: GGUFs whose prompts are asked for meanwhile, with their Modelfiles.
    """

    base: str
    base_sha256: str
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
    learns_empty_thoughts: bool
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    places: dict[str, GgufPlace] = field(default_factory=dict)
    general_tokens: int = 0
    general_answers: bool = False
    is_packed: bool = False
    ggufs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparedChat:
    """One compared chat.

    Attributes:
        ids: its tokens, as prepared.
        positions: the index before each trained token; the prediction there is measured.
        ends: indices into `positions` where the end token has to follow.
        weights: how much the loss at each of `positions` counts, from 0 to 1; None: in full.
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]
    weights: list[float] | None = None

    @property
    def weight(self) -> float:
        """How much all its trained tokens count together."""
        return len(self.positions) if self.weights is None else sum(self.weights)


@dataclass(frozen=True)
class GreedyAnswer:
    """The most likely answers to one prompt.

    Attributes:
        messages, ids: the prompt.
        base, tuned: the answers of the two models; None where none was generated.
        ended: the tuned model ended its answer with the end token.
        expected: the answer in the chat; None for a prompt of the user's own.
        tuned_ids: the tokens of the tuned model's answer; empty where none was generated.
    """

    messages: list[JsonObject]
    ids: list[int]
    base: str | None
    tuned: str | None
    ended: bool
    expected: str | None
    tuned_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; None or 0 where it was not.

    Attributes:
        loss, top1_agreement, kl_mean, kl_p99: see `comparison.StageCheck`.
        stops: of the reference's `stops`, those where this model ends too.
        prompts_equal, prompts: prompts that get the trained tokens, of all.
        defects: what is wrong besides the figures.
        chat_losses: sums over the trained tokens of each chat.
        survival: how much of the adapter's change is left in each matrix; empty where that was not measured.
    """

    loss: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    stops: int = 0
    prompts_equal: int = 0
    prompts: int = 0
    defects: list[Defect] = field(default_factory=list)
    chat_losses: list[float] = field(default_factory=list)
    survival: list[MatrixSurvival] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What the tuned model does: every GGUF is compared with it.

    Attributes:
        chats, prompts, answers: what is compared.
        probes: more prompts, for checking what is served.
        battery: a prompt for each trait of chats.
        bos: text of the tokenizer's BOS; "" for none.
        chat_losses: losses of base and tuned model, summed over the trained tokens of each chat, by their weights.
        labels: trained tokens of each chat.
        weights: how much those of each chat count together; [] where each counts in full.
        stops: ends where the tuned model's most likely token is the end token, as (chat, index into its positions).
        held_out: False when training chats are compared.
        whole: all held-out chats are compared.
        prepared_equal, prepared_chats: chats that get the same tokens and loss mask again, of those with a text.
        prepared_defects: what is wrong with the prepared chats.
        end_token: its text.
        pieces: the vocabulary by token id; None where an entry can't be compared.
        base_loss, tuned_loss: means over all trained tokens, by their weights.
        merged: figures of the merged model; None when there is none.
        notes: what was not compared.
        general: what base and tuned model can do in general; None where that was not measured.
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
    prepared_defects: list[Defect]
    end_token: str
    pieces: list[str | None]
    base_loss: float
    tuned_loss: float
    merged: Figures | None
    notes: list[Note]
    battery: list[Prompt] = field(default_factory=list)
    bos: str = ""
    weights: list[float] = field(default_factory=list)
    general: GeneralFigures | None = None

    @property
    def prompt_set(self) -> PromptSet:
        """What servers are asked for."""
        return PromptSet(self.prompts, self.probes, self.battery, self.pieces, self.bos)

    @property
    def chat_weights(self) -> Sequence[float]:
        """How much the trained tokens of each chat count together: what a mean loss is divided by."""
        return self.weights or self.labels


@dataclass(frozen=True)
class GgufTask:
    """Measure one GGUF and, if it has one, its Modelfile.

    Attributes:
        gguf: the file.
        modelfile: "" for none.
        reference: file of the `Reference`.
        before: file of the log-probabilities to compare with.
        after: file for the GGUF's own.
        system: the SYSTEM that the Modelfile should have.
        longest_answer: in tokens.
        answer_file: file for the `GgufMeasurement`.
        traits: those of the run's chats; None where they are unknown.
        threads: that compute; 0 for all cores.
        others: files of the other GGUFs' measurements; once all of them are there, all cores compute.
        unquantized: file of the measurement of the GGUF that is measured at the same time, which is waited for; "" for
            none.
        unquantized_after: its log-probabilities, which replace `before` if it could be measured.
    """

    gguf: str
    modelfile: str
    reference: str
    before: str
    after: str
    system: str
    longest_answer: int
    answer_file: str
    traits: list[ChatTrait] | None = None
    threads: int = 0
    others: list[str] = field(default_factory=list)
    unquantized: str = ""
    unquantized_after: str = ""


@dataclass(frozen=True)
class AskedPath:
    """What one way to write prompts made of those of the reference.

    Attributes:
        path: what renders them: "jinja" or "template"; see `ollama.prompt_path.PromptPath`.
        prompts: one result for each prompt of a chat, and each probe, that can be written in this way.
        battery: one for each prompt of the battery that can.
    """

    path: str
    prompts: list[PromptResult]
    battery: list[PromptResult]


@dataclass(frozen=True)
class GgufMeasurement:
    """The result of a `GgufTask`.

    Attributes:
        figures: of the GGUF itself.
        served_equal, served_prompts: prompts that are served with the trained tokens, of all.
        served_ended, served_answers: answers that end when served, of those that end in the reference.
        served_defects: what is wrong with the Modelfile.
        notes: what was not compared.
        paths: what each way to write prompts made of them.
        ollama_path: the one that the newest Ollama takes; "" where it can't be said.
    """

    figures: Figures
    served_equal: int = 0
    served_prompts: int = 0
    served_ended: int = 0
    served_answers: int = 0
    served_defects: list[Defect] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    paths: list[AskedPath] = field(default_factory=list)
    ollama_path: str = ""
