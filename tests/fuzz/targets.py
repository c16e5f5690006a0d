"""The parsers of strangers' bytes: functions that may raise a `KolotuneError` and nothing else."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from kolotune.base_models import hub, model_folder
from kolotune.chats.reading.files import read_chats
from kolotune.foundation import config
from kolotune.foundation.errors import KolotuneError
from kolotune.gguf import header
from kolotune.ollama import model_name
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_description, parse_modelfile
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.weights.adapter import read_adapter
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.weight_files import weight_files

Target = Callable[[bytes], None]

_directory = tempfile.TemporaryDirectory(prefix="kolotune-fuzz-")
FOLDER = Path(_directory.name)


def _chats(suffix: str) -> Target:
    def read(data: bytes) -> None:
        path = FOLDER / f"chats.{suffix}"
        path.write_bytes(data)
        for problem in read_chats([path]).problems:
            assert str(problem).isprintable()
            assert 1 <= problem.line <= data.count(b"\n") + data.count(b"\r") + 1

    return read


def _config(data: bytes) -> None:
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    resolved = config.resolve((config.load_file(path), "config.yaml", FOLDER))
    path.write_text(config.dump(resolved), encoding="utf-8", newline="")
    config.resolve((config.load_file(path), "config.yaml", FOLDER))


def _safetensors(data: bytes) -> None:
    path = FOLDER / "model" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # what is mapped must not be cut
    path.write_bytes(data)
    MappedTensors(weight_files(path.parent))


def _headers(data: bytes) -> None:
    """Parse the header without the library's own check before it."""
    path = FOLDER / "header.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    MappedTensors([path])


def _adapter(data: bytes) -> None:
    folder = FOLDER / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(data)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        import numpy as np
        from safetensors.numpy import save_file

        names = ("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")
        save_file({names[0]: np.ones((2, 4), np.float32), names[1]: np.ones((4, 2), np.float32)}, file)
    read_adapter(folder)


def _folder(data: bytes) -> None:
    """Read a model's config and index: two JSON files, in two lines."""
    folder = FOLDER / "base"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    config_json, _, index_json = data.partition(b"\n")
    (folder / "config.json").write_bytes(config_json)
    (folder / "model.safetensors.index.json").write_bytes(index_json)
    model_folder.check_model_folder(folder)


def _gguf(data: bytes) -> None:
    path = FOLDER / "model.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    header.read(path)


def _modelfile(data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    parse_description(text)
    found = parse_modelfile(text)
    with contextlib.suppress(KolotuneError):
        assert parse_modelfile(render_modelfile(found)) == found


def _written(data: bytes) -> None:
    """Write a text as each of the texts of a Modelfile."""
    text = data.decode("utf-8", errors="replace")
    for file in (
        Modelfile("./m.gguf", template=text),
        Modelfile("./m.gguf", system=text, license=text),
        Modelfile("./m.gguf", parameters=(("stop", text),)),
        Modelfile(text, system="x"),
    ):
        with contextlib.suppress(KolotuneError):
            assert parse_modelfile(render_modelfile(file)) == file


def _names(data: bytes) -> None:
    text = data.decode("utf-8", errors="surrogateescape")
    assert not hub.is_hub_id(text) or ".." not in text
    model_name.check_name(text)
    assert text.isascii() and text.isprintable()


TARGETS: dict[str, Target] = {
    "jsonl": _chats("jsonl"),
    "json": _chats("json"),
    "csv": _chats("csv"),
    "parquet": _chats("parquet"),
    "config": _config,
    "safetensors": _safetensors,
    "headers": _headers,
    "adapter": _adapter,
    "folder": _folder,
    "gguf": _gguf,
    "modelfile": _modelfile,
    "written": _written,
    "names": _names,
}


def run(name: str, data: bytes) -> None:
    """Run a parser on `data`; an error of the tree is not a finding."""
    try:
        TARGETS[name](data)
    except KolotuneError as error:
        assert error.cause
        assert error.exit_code > 1
