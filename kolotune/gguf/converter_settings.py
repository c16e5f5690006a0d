"""What llama.cpp's converter reads of a model's settings: those of the file, beside what transformers makes of them.

The converter has `config.json` read by the installed transformers, which renames settings and leaves some out; the
names that the converter asks for are those of the files on the hub. So a setting that transformers leaves out is put
back from the file, and one that files saved by transformers 5 lack is computed from what replaced it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.model_config import FILE


def _rotary(name: str, default: float) -> Callable[[JsonObject], object]:
    def read(settings: JsonObject) -> object:
        rotary = settings.get("rope_parameters")
        value = rotary.get(name) if isinstance(rotary, dict) else None
        return settings.get(name, default) if value is None else value

    return read


def _named(*names: str) -> Callable[[JsonObject], object]:
    return lambda settings: next((settings[name] for name in names if settings.get(name) is not None), None)


def _always(value: object) -> Callable[[JsonObject], object]:
    return lambda _: value


def _head_size(settings: JsonObject) -> object:
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def _falcon_heads(settings: JsonObject) -> object:
    """Return 1 for Falcons with one key head, for which transformers has the number of query heads in its settings."""
    if settings.get("multi_query") and not settings.get("new_decoder_architecture"):
        return 1
    return settings.get("num_kv_heads")


def _rotary_size(settings: JsonObject) -> object:
    size, share = settings.get("head_dim"), _rotary("partial_rotary_factor", 1.0)(settings)
    return int(size * share) if isinstance(size, int) and isinstance(share, int | float) else None


# Settings that files saved by transformers 5 lack, by the type of the model.
_DERIVED: Mapping[str, Mapping[str, Callable[[JsonObject], object]]] = {
    "cohere2": {"rotary_pct": _rotary("partial_rotary_factor", 1.0)},
    "deepseek_v3": {"scoring_func": _always("sigmoid")},
    "deepseek_v32": {"scoring_func": _always("sigmoid")},
    "dots1": {"scoring_func": _always("sigmoid")},
    "exaone_moe": {"scoring_func": _always("sigmoid")},
    "falcon": {"num_kv_heads": _falcon_heads},
    "falcon_h1": {"head_dim": _head_size},
    "gpt2": {"n_ctx": _named("n_positions", "max_position_embeddings")},
    "glm_moe_dsa": {"scoring_func": _always("sigmoid")},
    "gpt_neox": {"rotary_pct": _rotary("partial_rotary_factor", 0.25)},
    "minimax_m2": {"rotary_dim": _rotary_size, "scoring_func": _always("sigmoid")},
    "solar_open": {"partial_rotary_factor": _rotary("partial_rotary_factor", 1.0)},
}


_CORRECTED = frozenset({"num_kv_heads"})


def read_settings(folder: Path, read: Callable[[], JsonObject]) -> JsonObject:
    """Return the settings that the converter gets.

    Args:
        folder: of the model.
        read: the converter's own way to read them.
    """
    path = folder / FILE
    if not path.is_file():
        return read()
    settings = _with_file(read(), typed_storage.read_object(path))
    for name, derive in _DERIVED.get(str(settings.get("model_type")), {}).items():
        if (settings.get(name) is None or name in _CORRECTED) and (value := derive(settings)) is not None:
            settings[name] = value
    return settings


def _with_file(settings: JsonObject, file: JsonObject) -> JsonObject:
    """Return the settings with those of the file that are missing, in sections too."""
    merged = {**file, **settings}
    for name, section in file.items():
        own = settings.get(name)
        if isinstance(section, dict) and isinstance(own, dict):
            merged[name] = {**section, **own}
    return merged


def give_file_settings(model_base: Any) -> None:
    """Let the converter's class `ModelBase` read settings by `read_settings`, in this process."""
    read = model_base.load_hparams

    def load_hparams(dir_model: Path, is_mistral_format: bool) -> JsonObject:
        if is_mistral_format:
            settings: JsonObject = read(dir_model, is_mistral_format)
            return settings
        return read_settings(Path(dir_model), lambda: read(dir_model, is_mistral_format))

    model_base.load_hparams = staticmethod(load_hparams)


def leave_out_missing_drafts(model_class: Any, folder: Path) -> None:
    """Keep a converter from asking for layers that predict several tokens (MTP) where the model's files have none."""
    if getattr(model_class, "supports_mtp_export", False) and not _has_draft_layers(folder):
        model_class.no_mtp = True


def _has_draft_layers(folder: Path) -> bool:
    from kolotune.weights.safetensors_header import read_header

    names = (entry.name for path in sorted(folder.glob("*.safetensors")) for entry in read_header(path).entries)
    return any(name.startswith(("mtp.", "model.mtp.")) or ".nextn." in name or ".eh_proj." in name for name in names)
