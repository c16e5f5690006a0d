"""Which adapters can't be merged here: by the name of the method, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from kolotune.foundation.typed_storage import JsonObject

from .initial_matrices import Initial


class Instead(Enum):
    """What to do with an adapter that can't be merged here."""

    PEFT = (
        "Merge it with peft: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(OUT); "
        "then `kolotune export OUT`."
    )
    INITIAL = (
        "Convert it with peft where it was trained: model.save_pretrained(OUT, "
        "path_initial_model_for_weight_conversion=INITIAL), where INITIAL is the adapter as saved before training."
    )
    NOTHING = "It is computed beside the weights, so no merged model or GGUF can hold it; serve it with peft."


@dataclass(frozen=True)
class Refusal:
    """Why an adapter can't be merged here.

    Attributes:
        name: of the method, as its authors write it.
        instead: what to do.
    """

    name: str
    instead: Instead = Instead.PEFT


_BESIDE_WEIGHTS = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "P-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "CPT": "context-aware prompt tuning (CPT)",
    "CARTRIDGE": "Cartridges",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "XLORA": "X-LoRA",
    "POLY": "Poly",
    "LILY": "Lily",
    "SHADOW": "ShadowPEFT",
}
_OTHER_METHODS = {
    "ADALORA": "AdaLoRA",
    "ADAMSS": "AdaMSS",
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "BONE": "Bone",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "HRA": "HRA",
    "IA3": "(IA)³",
    "LN_TUNING": "LayerNorm tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "PEANUT": "PEANuT",
    "PSOFT": "PSOFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "supertuning",
    "TINYLORA": "TinyLoRA",
    "TRAINABLE_TOKENS": "trainable tokens without LoRA",
    "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
METHODS: Mapping[str, Refusal] = {
    **{kind: Refusal(name, Instead.NOTHING) for kind, name in _BESIDE_WEIGHTS.items()},
    **{kind: Refusal(name) for kind, name in _OTHER_METHODS.items()},
}
"""PEFT's other methods, by their ``peft_type``."""

_VARIANTS = {
    "use_bdlora": Refusal("BD-LoRA"),
    "use_qalora": Refusal("QA-LoRA"),
    "kasa_config": Refusal("KaSA"),
    "layer_replication": Refusal("LoRA on replicated layers"),
    "megatron_config": Refusal("LoRA on Megatron's parallel layers"),
    "alora_invocation_tokens": Refusal("activated LoRA (aLoRA)", Instead.NOTHING),
    "arrow_config": Refusal("Arrow", Instead.NOTHING),
}
_BASE_CHANGING = {
    "corda": Refusal("CorDA", Instead.INITIAL),
    "lora_ga": Refusal("LoRA-GA", Instead.INITIAL),
    "loftq": Refusal("LoftQ"),
    "pissa": Refusal("PiSSA by fast decomposition, which starts from random numbers", Instead.INITIAL),
}
_REPEATABLE = {"pissa": Initial.PISSA, "olora": Initial.OLORA}
_HARMLESS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
_OTHER_TASKS = {
    "SEQ_CLS": "a classifier",
    "TOKEN_CLS": "a classifier of tokens",
    "QUESTION_ANS": "an extractive question answerer",
    "SEQ_2_SEQ_LM": "an encoder-decoder",
}


def refused_variant(values: JsonObject) -> Refusal | None:
    """Return why a LoRA adapter with this config can't be merged; None when it can be."""
    for option, refusal in _VARIANTS.items():
        if values.get(option):
            return refusal
    return None


def refused_initialisation(value: object) -> Refusal | None:
    """Return the refusal for an ``init_lora_weights`` that takes something out of the base model's weights.

    What is taken out can be computed again for some; see `initial_matrices`. An unknown value is refused by its own
    name, since nobody knows what it did to the base.
    """
    name = str(value).lower()
    if name in _HARMLESS or name in _REPEATABLE:
        return None
    known = next((refusal for prefix, refusal in _BASE_CHANGING.items() if name.startswith(prefix)), None)
    return known or Refusal(f"the initialisation {str(value)[:40]!r}")


def initial_matrices(value: object) -> Initial | None:
    """Return what an ``init_lora_weights`` takes out of the base model's weights, where that can be computed again."""
    return _REPEATABLE.get(str(value).lower())


def other_task(values: JsonObject) -> str:
    """Return what the adapter was trained as, when that is no model that writes text; "" otherwise."""
    return _OTHER_TASKS.get(str(values.get("task_type")), "")
