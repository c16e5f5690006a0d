"""Plant faults in a finished run, and seal its records again over them."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kolotune.base_models import lookup
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.stages import STAGES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record, write_record
from kolotune.run_folder.results import quantize_facts
from kolotune.run_folder.stage import Context


def context_of(config: Config) -> Context:
    base = lookup.resolve(config.base_model, None, PlainReporter())
    return Context(config, RunFolder(config.output_dir), base)


def seal(config: Config) -> None:
    """Write all records again, with the hashes of the files as they are now."""
    context = context_of(config)
    hasher = context.hasher
    for stage in STAGES:
        record = read_record(context.run, stage.NAME)
        if record is None:
            continue
        facts = dict(record.facts)
        if stage.NAME == "quantize":
            facts["made"] = {
                name: {"source": hasher.of(context.run.gguf), "sha256": hasher.of(context.run.quantized(name))}
                for name in quantize_facts(record).made
            }
        write_record(stage, context, facts, record.started)


def rerun_stages(config: Config, *names: str) -> None:
    """Seal the records, and run later stages with what was planted."""
    seal(config)
    for name in names:
        RunFolder(config.output_dir).record(name).unlink()
    run_pipeline(config, PlainReporter(), list(names))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a folder with one safetensors file."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def change_bytes(file: Path, old: bytes, new: bytes) -> None:
    """Replace bytes that occur once by as many others."""
    assert len(old) == len(new)
    with file.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as data:
        offset = data.find(old)
        assert offset >= 0 and data.find(old, offset + 1) < 0
        data[offset : offset + len(new)] = new


def change_tensors(file: Path, changes: dict[str, Callable[[Any], Any]]) -> None:
    """Change tensors of a GGUF in place, as the arrays that are stored."""
    import gguf

    reader: Any = gguf.GGUFReader(str(file), "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, change in changes.items():
        tensors[name].data[:] = change(tensors[name].data.copy())
    reader.data.flush()
