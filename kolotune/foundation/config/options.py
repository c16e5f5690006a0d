"""Every option of a run, once: its name, type, bounds and default, and what the option is; see `option`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from kolotune.foundation.engine_registry import ENGINES, EngineName
from kolotune.foundation.objectives import OBJECTIVES, ObjectiveName

from .option import Group, Kind, Option, option

DEFAULT_OUTPUT_DIR = Path("outputs")
# Defaults of the verbs that talk to a model; these are not options of a run.
DEFAULT_TEMPERATURE, DEFAULT_MAX_TOKENS, DEFAULT_SEED = 0.7, 512, 0
RECORD_PARTS = (
    "messages", "question", "answer", "context", "system", "reasoning", "tools", "history", "choices", "documents",
    "chosen", "rejected", "label", "text",
)  # fmt: skip
"""Parts of a chat that a key of a record may have; what `map` names."""
DEFAULT_HOST, DEFAULT_PORT, DEFAULT_PARALLEL = "127.0.0.1", 8080, 4


@dataclass(frozen=True)
class Config:
    """All options of a run, resolved. Paths are absolute, names are in their canonical case."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic, not a field

    train_data: tuple[Path, ...] = option(
        (), "Files of chats: JSONL, JSON, CSV, Parquet or Excel.", Group.DATA, kind=Kind.CHAT_FILES
    )
    eval_data: tuple[Path, ...] = option(
        (), "Held-out chats, instead of a share of the training data.", Group.DATA, kind=Kind.CHAT_FILES
    )
    eval_split: Annotated[float, Ge(0), Lt(1)] = option(
        0.05, "Share of the chats to hold out, chosen by content.", Group.DATA, stages="prepare"
    )
    skip_bad: bool = option(
        False, "Skip bad chats instead of stopping; they are counted and listed.", Group.DATA, stages="prepare",
        without="check"
    )  # fmt: skip
    map: tuple[str, ...] = option(
        (),
        "Which key of the records has which part of a chat, such as question=Frage,context=Table; parts: "
        f"{', '.join(RECORD_PARTS)}.",
        Group.DATA,
        kind=Kind.NAMES,
        stages="prepare",
        is_default_recorded=False,
    )
    ignore_keys: tuple[str, ...] = option(
        (),
        "Keys of records and turns that are not to be read, such as weight,rating; they are not reported either.",
        Group.DATA,
        kind=Kind.NAMES,
        stages="prepare",
        is_default_recorded=False,
    )
    objective: ObjectiveName = option(
        "sft",
        f"What is learned: {'; '.join(f'{name}, {entry.summary}' for name, entry in OBJECTIVES.items())}.",
        Group.DATA,
        stages="prepare train",
        more_verbs="train",
        is_default_recorded=False,
    )
    split_thoughts: bool = option(
        False,
        "Make one chat of each exchange where the template leaves thoughts out of later prompts.",
        Group.DATA,
        stages="prepare",
        is_default_recorded=False,
    )
    fix_turns: bool = option(
        False,
        "Fix the order of turns: drop a last question and a greeting before the first, join turns of one role in a "
        "row; each change is counted.",
        Group.DATA,
        stages="prepare",
        is_default_recorded=False,
    )
    train_on: Literal["all", "last", "flagged"] = option(
        "all",
        "Which answers count in the loss, of those that no weight or flag excludes: all, the last of each chat, or the "
        "flagged, whose weight or flag says that they count.",
        Group.DATA,
        stages="prepare",
        is_default_recorded=False,
    )
    keep_general: Annotated[float, Ge(0), Le(100)] = option(
        0.0,
        "Percent: for each 100 chats to train on, mix in that many with the base's own answers to general prompts, so "
        "that it forgets less.",
        Group.DATA,
        stages="prepare",
        without="check",
        is_default_recorded=False,
    )
    max_seq_length: Annotated[int, Ge(8)] = option(
        2048,
        "Longest chat in tokens. Longer chats lose whole turns; the number is reported.",
        Group.DATA,
        stages="prepare",
    )
    chat_template: Path | None = option(
        None,
        "A chat template of your own, a Jinja file, to train with and serve in place of the base model's.",
        Group.DATA,
        kind=Kind.FILE,
    )
    template_switch: tuple[str, ...] = option(
        (),
        "Variables of the chat template that servers may set, such as enable_thinking: both sides are trained, on for "
        "answers with reasoning and off for others.",
        Group.DATA,
        kind=Kind.NAMES,
        stages="prepare",
        is_default_recorded=False,
    )
    empty_thoughts: Literal["mask", "learn"] = option(
        "mask",
        "The empty thought that a template writes before an answer without one: mask it, which keeps the base's "
        "ability to think, or learn it.",
        Group.DATA,
        stages="prepare",
        is_default_recorded=False,
    )
    template_date: str | None = option(
        None,
        "Date (YYYY-MM-DD) for a chat template that prints today's; default: the date of the first run.",
        Group.DATA,
        kind=Kind.DATE,
        stages="prepare",
    )

    base_model: str = option(
        "smollm2-135m", "Name from `kolotune models`, hub id or folder.", Group.MODEL, kind=Kind.BASE_MODEL
    )
    hf_token: str | None = option(
        None,
        "Where to read the hub token: a file, or - for standard input. Never the token itself.",
        Group.MODEL,
        kind=Kind.SECRET_SOURCE,
        without="launch",
        is_saved=False,
    )
    new_token: tuple[str, ...] = option(
        (),
        "A token to add to the vocabulary, found in any text; its rows of embedding and head are trained; may be "
        "repeated.",
        Group.MODEL,
        kind=Kind.TEXTS,
    )
    new_special_token: tuple[str, ...] = option(
        (), "The same for a token that only the chat template writes; may be repeated.", Group.MODEL, kind=Kind.TEXTS
    )
    engine: EngineName = option(
        "native",
        f"Training engine: {'; '.join(f'{name}, {entry.summary}' for name, entry in ENGINES.items())}.",
        Group.MODEL,
        stages="train",
        without="check",
    )
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "Arithmetic of the frozen weights in training; auto: bf16 where the processor is fast at it.",
        Group.MODEL,
        stages="train",
        without="check",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "Compile parts of the training step for this processor; auto: where possible (C++ compiler, no GPU).",
        Group.MODEL,
        stages="train",
    )
    load_in_4bit: bool = option(
        False,
        "Keep the base in 4 bits (NF4) while training; one that `kolotune dequantize` made, in the blocks of its GGUF.",
        Group.MODEL,
        stages="train",
        without="check",
    )

    track: Literal["none", "trackio", "wandb", "mlflow", "tensorboard"] = option(
        "none",
        "Show the training's metrics in a tracker, by its own client, which is an extra to install; a resumed training "
        "continues the same tracked run.",
        Group.TRAINING,
    )
    track_project: str = option("kolotune", "The project (MLflow: experiment) in the tracker.", Group.TRAINING)
    epochs: Annotated[int, Ge(0)] = option(3, "Passes over the training data.", Group.TRAINING, stages="train")
    learning_rate: Annotated[float, Ge(0), Le(1)] = option(2e-4, "Peak learning rate.", Group.TRAINING, stages="train")
    scheduler_type: Literal["cosine", "linear", "constant"] = option(
        "cosine", "How the learning rate decays.", Group.TRAINING, stages="train"
    )
    warmup_steps: Annotated[int, Ge(0)] | None = option(
        None,
        "Steps in which the learning rate rises; default: a tenth of all, at most 100.",
        Group.TRAINING,
        stages="train",
    )
    weight_decay: Annotated[float, Ge(0), Le(1)] = option(0.01, "AdamW's weight decay.", Group.TRAINING, stages="train")
    batch_size: Annotated[int, Ge(1)] | None = option(
        None,
        "Chats in a batch; default: 4, or more if the chats are short, up to 1,000 tokens in a batch.",
        Group.TRAINING,
        stages="train",
    )
    gradient_accumulation: Annotated[int, Ge(1)] = option(1, "Batches in a step.", Group.TRAINING, stages="train")
    max_grad_norm: Annotated[float, Ge(0)] = option(
        1.0, "Clip gradients to this norm; 0: never.", Group.TRAINING, stages="train"
    )
    seed: Annotated[int, Ge(0), Lt(2**32)] = option(
        42, "Seed of initial weights, order and dropout.", Group.TRAINING, stages="train"
    )
    start_from: Path | None = option(
        None,
        "The adapter to train further: its folder, or that of its run. Rank, alpha and layers are its own; the base "
        "model must be the same.",
        Group.TRAINING,
        kind=Kind.ADAPTER,
    )
    lora_rank: Annotated[int, Ge(1), Le(4096)] = option(16, "Rank of the adapter.", Group.TRAINING, stages="train")
    lora_alpha: Annotated[float, Gt(0)] = option(
        32.0, "Scale of the adapter, which is multiplied by alpha / rank.", Group.TRAINING, stages="train"
    )
    rank_pattern: tuple[str, ...] = option(
        (),
        "Rank of some layers, such as q_proj=8: the end of a name, or a regular expression for it; may be repeated.",
        Group.TRAINING,
        kind=Kind.PARAMETERS,
        stages="train",
        is_default_recorded=False,
    )
    alpha_pattern: tuple[str, ...] = option(
        (),
        "Alpha of some layers, in the same form.",
        Group.TRAINING,
        kind=Kind.PARAMETERS,
        stages="train",
        is_default_recorded=False,
    )
    use_rslora: bool = option(
        False,
        "Multiply the adapter by alpha / sqrt(rank) instead (rank-stabilised LoRA), so that a higher rank learns more.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    use_dora: bool = option(
        False,
        "Train the length of each output's weights beside their direction (DoRA); a step takes longer and keeps more.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    init_lora_weights: Literal["default", "pissa", "olora"] = option(
        "default",
        "What adapters start as: default, nothing; pissa or olora, the main part of the base's weights, which lose it.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    lora_plus_ratio: Annotated[float, Ge(1)] = option(
        1.0,
        "Learning rate of the adapter's second matrix (B), divided by that of the first (LoRA+); 1: the same.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    neftune_noise_alpha: Annotated[float, Ge(0)] = option(
        0.0,
        "Noise on the embeddings while training (NEFTune), such as 5; 0: none. Then no two sequences share anything.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "Dropout before the adapter.", Group.TRAINING, stages="train"
    )
    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "Names of the layers that get an adapter, such as q_proj,v_proj; all-linear: all but the head.",
        Group.TRAINING,
        kind=Kind.NAMES,
        stages="train",
    )
    target_parameters: tuple[str, ...] = option(
        ("auto",),
        "Names of experts' weights that get an adapter, such as experts.down_proj; all-experts; none; auto: all, if "
        "all-linear is trained and they fit into memory.",
        Group.TRAINING,
        kind=Kind.NAMES,
        stages="train",
        is_default_recorded=False,
    )
    modules_to_save: tuple[str, ...] = option(
        (),
        "Names of modules to train whole and save with the adapter, such as embed_tokens,norm; transformers then "
        "computes the training, which takes longer.",
        Group.TRAINING,
        kind=Kind.NAMES,
        stages="train",
        is_default_recorded=False,
    )
    beta: Annotated[float, Gt(0)] | None = option(
        None,
        "How strongly preferences count beside the model as it was (orpo: beside the answers' own loss); default: "
        f"{', '.join(f'{entry.beta:g} for {name}' for name, entry in OBJECTIVES.items() if entry.beta)}.",
        Group.TRAINING,
        stages="train",
        is_default_recorded=False,
    )
    simpo_gamma: Annotated[float, Ge(0)] = option(
        0.5, "Margin by which simpo prefers an answer.", Group.TRAINING, stages="train", is_default_recorded=False
    )
    desirable_weight: Annotated[float, Ge(0)] = option(
        1.0, "How much good answers count for kto.", Group.TRAINING, stages="train", is_default_recorded=False
    )
    undesirable_weight: Annotated[float, Ge(0)] = option(
        1.0, "How much bad answers count for kto.", Group.TRAINING, stages="train", is_default_recorded=False
    )
    early_stopping: Annotated[int, Ge(0)] = option(
        0,
        "Stop if the held-out loss (for preferences: accuracy) has not improved for this many epochs, and keep the "
        "best; 0: never.",
        Group.TRAINING,
        stages="train",
    )
    checkpoint_steps: Annotated[int, Ge(0)] = option(
        100, "Write a checkpoint every so many steps and after each epoch; 0: after each epoch only.", Group.TRAINING
    )
    use_checkpoint: bool = option(
        False, "Resume from the newest intact checkpoint, if there is one.", Group.TRAINING, is_saved=False
    )

    nproc: Annotated[int, Ge(1)] = option(
        1, "Processes on this machine that train together; the result is the same within rounding.", Group.MACHINES
    )
    nnodes: Annotated[int, Ge(1)] = option(
        1, "Machines that train together; start the same command on each.", Group.MACHINES
    )
    rdzv: str | None = option(
        None, "HOST:PORT where several machines meet: the address of one of them, the same for all.", Group.MACHINES
    )
    sharding: Literal["auto", "on", "off"] = option(
        "auto",
        "Shard the base over the processes instead of copying it into each; auto: if it does not fit otherwise.",
        Group.MACHINES,
    )

    merge_dtype: Literal["f16", "bf16", "fp32"] = option(
        "f16",
        "How merged weights are stored. If a value is too large for f16, fp32 is used and reported.",
        Group.EXPORT,
        stages="merge compare",
        more_verbs="merge",
        without="prepare modelfile",
    )
    quantization: tuple[str, ...] = option(
        ("Q4_K_M",),
        "Quantizations such as Q4_K_M,Q8_0; to a budget, auto:90MB or auto:kl=0.02; the word none: f16 only.",
        Group.EXPORT,
        kind=Kind.QUANTIZATIONS,
        stages="quantize modelfile compare",
        more_verbs="quantize",
        without="prepare",
    )
    importance_matrix: Literal["auto", "always", "never"] = option(
        "auto",
        "Weigh quantization by the training chats; auto: for quantizations that need it or have under 4 bits.",
        Group.EXPORT,
    )
    quantizer: Literal["ggml", "compensated"] = option(
        "ggml",
        "How weights are rounded: ggml, as llama.cpp does it; compensated, each column makes good the errors of those "
        "before it, by what goes into it: the same types and size, closer to the tuned model, and takes longer.",
        Group.EXPORT,
        stages="quantize compare",
        more_verbs="quantize",
        without="prepare",
        is_default_recorded=False,
    )
    system: str | None = option(
        None, "System prompt for the Modelfile.", Group.EXPORT, stages="modelfile compare", without="prepare"
    )
    parameter: tuple[str, ...] = option(
        (),
        "PARAMETER for the Modelfile, such as temperature=0.7; may be repeated.",
        Group.EXPORT,
        kind=Kind.PARAMETERS,
        stages="modelfile",
        without="prepare",
    )
    lean: bool = option(
        False,
        "Keep no merged folder, and no unquantized GGUF unless nothing else is made.",
        Group.EXPORT,
        more_verbs="merge convert quantize",
        without="prepare",
    )
    compare: bool = option(
        True, "Prove at the end that the exported model is the trained one.", Group.EXPORT, without="modelfile"
    )
    compare_chats: Annotated[int, Ge(1)] = option(
        32,
        "Maximum number of held-out chats to compare on (training chats if none are held out).",
        Group.COMPARISON,
        stages="compare",
    )
    compare_length: Annotated[int, Ge(1)] = option(
        4096, "Maximum number of tokens in them; at least one chat is compared.", Group.COMPARISON, stages="compare"
    )
    compare_answers: Annotated[int, Ge(0)] = option(
        3,
        "Number of held-out prompts that base and tuned model answer side by side.",
        Group.COMPARISON,
        stages="compare",
    )
    compare_prompt: tuple[str, ...] = option(
        (),
        "A prompt of your own to answer instead; may be repeated.",
        Group.COMPARISON,
        kind=Kind.TEXTS,
        stages="compare",
    )
    general: Literal["off", "loss", "full"] = option(
        "loss",
        "What is measured of forgetting, on texts that have nothing to do with the chats: off; loss, on some prose; "
        "full, on more of it, and answers to 60 short questions.",
        Group.COMPARISON,
        stages="compare",
        is_default_recorded=False,
    )
    compare_quantization: tuple[str, ...] = option(
        (),
        "Other quantizations to make, measure and remove again, such as Q5_K_M,IQ3_M.",
        Group.COMPARISON,
        kind=Kind.QUANTIZATIONS,
    )
    output_dir: Path = option(
        DEFAULT_OUTPUT_DIR, "The run folder.", Group.EXPORT, kind=Kind.FOLDER, without="modelfile"
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # options that somebody gave


OPTIONS: dict[str, Option] = {each.name: each.metadata["option"] for each in fields(Config) if each.metadata}
"""What each option is, by name, in the order of the fields."""


def option_names(*, kind: Kind | None = None, stage: str | None = None) -> list[str]:
    """Return the names of all options, of a kind or in a stage's fingerprint where one is given."""
    return [
        name for name, each in OPTIONS.items() if kind in (None, each.kind) and (stage is None or stage in each.stages)
    ]


def stage_options(config: Config, stage: str) -> dict[str, object]:
    """Return the options that are part of a stage's fingerprint whatever the run is, as plain values."""
    names = [
        name
        for name in option_names(stage=stage)
        if OPTIONS[name].is_default_recorded or getattr(config, name) != OPTIONS[name].default
    ]
    return plain_values(config, names)


def plain_values(config: Config, names: Iterable[str]) -> dict[str, object]:
    """Return some options as JSON and YAML write them."""
    return {name: _plain(getattr(config, name)) for name in names}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value
