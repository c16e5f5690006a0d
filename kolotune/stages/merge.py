"""merge: base and adapter → one model folder, a tensor at a time, computed in fp32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import adapters
from ..chats.tokenizer import TOKENIZER_FILES
from ..config import Config, as_record
from ..errors import ArtifactError
from ..files import replacing
from ..records import Context
from ..reporter import Reporter
from ..weights import ShardWriter, tensors_in, weight_files

if TYPE_CHECKING:
    from torch import Tensor

NAME = "merge"
DOING = "merging the adapter into the base model"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


def options(config: Config) -> dict[str, Any]:
    """See `records.Stage`."""
    return as_record(config, ("merge_dtype",))


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    return {
        "the adapter": _adapter_folder(context),
        "the base model": context.base,
        "the tokenizer": _tokenizer_folder(context),
    }


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    return [context.run.merged_model]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("torch", "safetensors")


def preflight(context: Context, reporter: Reporter) -> None:
    """The base's weights must be readable, and an adapter made elsewhere must be one that can be merged."""
    del reporter
    weight_files(context.base)
    if context.source is not None:
        adapters.read(context.source)


def run(context: Context, reporter: Reporter) -> dict[str, Any]:
    """Writes the merged model; see `merge_adapter`."""
    with replacing(context.run.merged_model) as partial:
        partial.mkdir()
        return merge_adapter(
            _adapter_folder(context),
            context.base,
            partial,
            tokenizer=_tokenizer_folder(context),
            dtype=context.config.merge_dtype,
            reporter=reporter,
        )


def _adapter_folder(context: Context) -> Path:
    return context.source or context.run.adapter


def _tokenizer_folder(context: Context) -> Path:
    """The tokenizer that was trained with: the run's own, the adapter's when it brings one, or the base's."""
    if context.source is None:
        return context.run.tokenizer
    return tokenizer_of(context.source, context.base)


def tokenizer_of(adapter: Path, base: Path) -> Path:
    """An adapter's own tokenizer folder when it has a tokenizer, else the base's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file() else base


@dataclass
class _Merge:
    """Stores merged weights and counts what could not be stored as wanted."""

    dtype: str
    kept_wide: list[str] = field(default_factory=list)

    def stored(self, name: str, weight: Tensor, original: Tensor, adapted: bool) -> Tensor:
        """`weight` in the wanted dtype; where a value is out of f16's range, bf16 as it was, or fp32.

        Raises:
            ArtifactError: a value is not finite.
        """
        import torch

        if not weight.is_floating_point():
            return weight
        wanted = {"f16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]
        low, high = weight.aminmax() if weight.numel() else (torch.zeros(()), torch.zeros(()))
        largest = torch.maximum(low.abs(), high.abs())
        if not bool(largest.isfinite()):
            raise ArtifactError(f"{name}: a merged weight is not finite", "Train again with a lower --learning-rate.")
        if wanted is torch.float16 and float(largest) > torch.finfo(torch.float16).max:
            self.kept_wide.append(name)
            wanted = original.dtype if not adapted and original.dtype is torch.bfloat16 else torch.float32
        return weight.to(wanted)


def merge_adapter(
    adapter_folder: Path, base: Path, target: Path, *, tokenizer: Path, dtype: str, reporter: Reporter
) -> dict[str, Any]:
    """Merges an adapter into its base.

    Args:
        adapter_folder: in PEFT's format.
        base: model folder with safetensors.
        target: an existing empty folder.
        tokenizer: folder whose tokenizer and template go with the merged model.
        dtype: "f16", "bf16" or "fp32".
        reporter: told about weights that f16 can't hold.

    Returns:
        Facts for the record: tensors, bytes, adapted weights, and weights stored wider than wanted.

    Raises:
        ArtifactError, ModelError: the adapter does not belong to the base, or a file is damaged.
    """
    adapter = adapters.read(adapter_folder)
    files = weight_files(base)
    names = _names_in(files)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    deltas = {_base_name(name, names): _oriented(delta, name, config) for name, delta in adapter.deltas.items()}
    replaced = {_base_name(name, names): tensor for name, tensor in adapter.replaced.items()}
    untied = _HEAD not in names and _changes_one_of_two(adapter, {*deltas, *replaced})
    merge = _Merge(dtype)
    writer = ShardWriter(target, [*names, _HEAD])
    for name, tensor in tensors_in(files):
        if untied and name == _EMBEDDING:
            writer.add(_HEAD, _merged(merge, _HEAD, tensor, deltas.pop(_HEAD, None), replaced.pop(_HEAD, None)))
        writer.add(name, _merged(merge, name, tensor, deltas.pop(name, None), replaced.pop(name, None)))
    if deltas or replaced:
        raise ArtifactError(
            f"the adapter changes {next(iter([*deltas, *replaced]))}, which the base model does not have",
            "Give the base model that the adapter was trained on (--base).",
        )
    writer.close()
    if untied:
        config["tie_word_embeddings"] = False
    _write_config(config, dtype, target)
    _copy_small_files(base, tokenizer, target)
    if merge.kept_wide:
        first, count = merge.kept_wide[0], len(merge.kept_wide)
        reporter.warning(f"{count} weights are out of f16's range and stay wider: {first} …")
    return {
        "tensors": len(names) + untied,
        "bytes": writer.total_bytes,
        "adapted": len(adapter.deltas),
        "stored_wider": merge.kept_wide,
    }


def _merged(merge: _Merge, name: str, tensor: Tensor, delta: adapters.Delta | None, whole: Tensor | None) -> Tensor:
    if whole is not None and whole.shape != tensor.shape:
        raise ArtifactError(f"{name}: the adapter brings {tuple(whole.shape)} for {tuple(tensor.shape)}")
    # PEFT saves adapted embeddings and heads whole, beside their adapters: the one is what the other is added to.
    source = tensor if whole is None else whole
    weight = source if delta is None else delta.added_to(source)
    return merge.stored(name, weight, tensor, adapted=weight is not tensor)


def _changes_one_of_two(adapter: adapters.Adapter, changed: Set[str]) -> bool:
    """Whether tied embedding and head differ with the adapter: PEFT changes just the one that it names."""
    return _HEAD in changed or (_EMBEDDING in changed and not adapter.config.get("ensure_weight_tying"))


def _oriented(delta: adapters.Delta, name: str, config: dict[str, Any]) -> adapters.Delta:
    """GPT-2 keeps all but its head as [in, out]; the adapter's config says so of its last module alone."""
    if config.get("model_type") != "gpt2" or name.endswith((".wte.weight", ".wpe.weight")):
        return delta
    return replace(delta, transposed=_CONV1D.search(name) is not None)


def _names_in(files: list[Path]) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for path in files:
        with safe_open(path, framework="pt") as handle:
            names += list(handle.keys())
    return names


def _base_name(name: str, names: Sequence[str]) -> str:
    """The base's name of an adapted weight: some bases are saved without the outer module's name."""
    known = set(names)
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in known:
            return candidate
    return name


def _write_config(config: dict[str, Any], dtype: str, target: Path) -> None:
    """The base's config with the dtype that the weights ask for in arithmetic.

    Gemma overflows in f16 arithmetic, though its weights fit: it asks for bfloat16.
    """
    gemma = str(config.get("model_type", "")).startswith("gemma")
    arithmetic = {"f16": "bfloat16" if gemma else "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]
    for key in ("torch_dtype", "dtype"):
        if key in config or key == "dtype":
            config[key] = arithmetic
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("torch_dtype", None)
        config["text_config"].pop("dtype", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_small_files(base: Path, tokenizer: Path, target: Path) -> None:
    for name in ("generation_config.json", *TOKENIZER_FILES):
        source = next((folder / name for folder in (tokenizer, base) if (folder / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, target / name)
