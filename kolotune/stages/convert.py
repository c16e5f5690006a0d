"""convert: merged model → unquantized GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import llamacpp
from ..adapters import is_adapter
from ..cache import cache_folder
from ..chats.tokenizer import TEMPLATE_FILE
from ..config import Config
from ..errors import ArtifactError, ToolchainError
from ..files import hash_file, replacing, write_text
from ..llamacpp import gguf_file
from ..records import Context
from ..reporter import Reporter
from ..runners import local
from ..weights import weight_files

NAME = "convert"
DOING = "converting to GGUF"
_ADD_BOS = "tokenizer.ggml.add_bos_token"
# The converter must find everything in the folder and ask nobody.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def options(config: Config) -> dict[str, Any]:
    """See `records.Stage`."""
    del config
    return {}


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    return {"the merged model": merged_folder(context)}


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    return [context.run.gguf]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("llama-cpp-python",)


def merged_folder(context: Context) -> Path:
    """The run's merged model, or one that was made elsewhere."""
    if context.source is not None and not is_adapter(context.source):
        return context.source
    return context.run.merged_model


def preflight(context: Context, reporter: Reporter) -> None:
    """Proves on the base model, before hours of training, that the converter knows its architecture and tokenizer.

    Raises:
        ToolchainError: it does not.
    """
    toolchain = llamacpp.ensure(reporter)
    folder = context.base if context.source is None or is_adapter(context.source) else context.source
    proof = cache_folder("conversions") / f"{_shape_digest(folder)}-{toolchain.version}"
    if toolchain.version != "own" and proof.is_file():
        return
    reporter.doing("dry conversion: can llama.cpp convert this model?")
    log = context.run.log("dry_conversion")
    code = local.run(_argv(toolchain, folder, "f16", context.run.gguf, dry=True), log=log, env=_OFFLINE)
    if code != 0:
        raise ToolchainError(
            f"llama.cpp can't convert {folder.name}: {local.last_lines(log)}",
            f"Use a base model that it knows; the whole answer is in {log}.",
        )
    write_text(proof, f"{folder}\n")


def _shape_digest(folder: Path) -> str:
    """Names what the converter's answer depends on: config, tokenizer and the tensors' names and shapes."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        digest.update((hash_file(folder / name) if (folder / name).is_file() else "-").encode())
    for path in weight_files(folder):
        with path.open("rb") as handle:
            digest.update(handle.read(int.from_bytes(handle.read(8), "little")))
    return digest.hexdigest()[:32]


def run(context: Context, reporter: Reporter) -> dict[str, Any]:
    """Converts the merged model; see `convert_folder`."""
    merged = merged_folder(context)
    if not merged.is_dir():
        raise ArtifactError(f"{merged}: there is no merged model", "Run `kolotune merge` first.")
    return convert_folder(merged, context.run.gguf, context.run.log(NAME), reporter)


def convert_folder(model: Path, target: Path, log: Path, reporter: Reporter, *, exact: bool = True) -> dict[str, Any]:
    """Converts a model folder to a GGUF, reads it back and checks it against the folder.

    Args:
        model: folder in the hub's format.
        target: the GGUF to make.
        log: where the converter's output goes.
        reporter: told when the GGUF gets larger than 16 bits a weight.
        exact: keep every weight's value; False: f16, whatever the weights are.

    Returns:
        Facts for the record: architecture, number of tensors, type, version of the toolchain.

    Raises:
        ToolchainError: the converter failed.
        ArtifactError: what it wrote is not whole, or its template or BOS is not the folder's.
    """
    toolchain = llamacpp.ensure(reporter)
    kind = _output_type(model) if exact else "f16"
    if kind == "f32":
        reporter.warning("not all weights are f16: the unquantized GGUF is written in f32, so that it holds them all")
    with replacing(target) as partial:
        code = local.run(_argv(toolchain, model, kind, partial), log=log, env=_OFFLINE)
        if code != 0 or not partial.is_file():
            raise ToolchainError(f"llama.cpp's converter failed: {local.last_lines(log)}", f"The log is {log}.")
        summary = gguf_file.read(partial)
        wanted = _wanted_bos(model)
        if wanted is not None and summary.fields.get(_ADD_BOS, wanted) != wanted:
            # The converter believes tokenizer.json's post-processor, which the chats were not encoded with.
            gguf_file.set_flag(partial, _ADD_BOS, wanted)
            summary = gguf_file.read(partial)
        _check_against(summary, model, target)
    return {
        "architecture": summary.architecture,
        "tensors": len(summary.tensors),
        "type": kind,
        "toolchain": toolchain.version,
    }


def _argv(toolchain: llamacpp.Toolchain, model: Path, kind: str, target: Path, dry: bool = False) -> list[str]:
    argv = [sys.executable, str(toolchain.converter), "--outtype", kind, "--outfile", str(target.absolute())]
    return [*argv, *(["--dry-run"] if dry else []), str(model.absolute())]


def _output_type(merged: Path) -> str:
    """The type that holds the merged weights' matrices exactly."""
    from safetensors import safe_open

    kinds = set()
    for path in weight_files(merged):
        with safe_open(path, framework="pt") as handle:
            slices = (handle.get_slice(name) for name in handle.keys())  # noqa: SIM118 - no mapping
            kinds |= {each.get_dtype() for each in slices if len(each.get_shape()) > 1}
    return {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(frozenset(kinds), "f32")


def _check_against(summary: gguf_file.GgufSummary, merged: Path, shown: Path) -> None:
    """Template and BOS of the GGUF must be those that were trained with."""
    template = merged / TEMPLATE_FILE
    if template.is_file() and summary.fields.get("tokenizer.chat_template") != template.read_text(encoding="utf-8"):
        raise ArtifactError(f"{shown}: its chat template is not the one that was trained with")
    wanted = _wanted_bos(merged)
    if wanted is not None and bool(summary.fields.get(_ADD_BOS, wanted)) != wanted:
        raise ArtifactError(f"{shown}: its BOS is not the one that was trained with")


def _wanted_bos(model: Path) -> bool | None:
    """Whether who serves the model has to add a BOS; None: its folder doesn't say."""
    config = model / "tokenizer_config.json"
    wanted = json.loads(config.read_text(encoding="utf-8")).get("add_bos_token") if config.is_file() else None
    return wanted if isinstance(wanted, bool) else None
