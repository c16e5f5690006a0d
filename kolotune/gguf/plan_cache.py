"""Conversion plans in the user's cache: traced when first needed, then read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.files import flush, remove
from kolotune.foundation.typed_storage import StorageError
from kolotune.llamacpp.toolchain import Toolchain
from kolotune.runners import child_process, local

from . import writer_form
from .conversion_plan import ConversionPlan, TensorPlan
from .model_skeleton import ModelSkeleton

HEADER, PLAN = "header.gguf", "tensors.json"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of the converter: it must find everything in the folder."""
_VERSION = 4  # raised when the files or the tracing change
_MOST_PLANS = 16
_SWITCH = "KOLOTUNE_CONVERSION_PLAN"


@dataclass(frozen=True)
class StoredPlan:
    """The file `PLAN`, beside the `HEADER`: a plan's tensors, or the reason why there is no plan."""

    tensors: tuple[TensorPlan, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class PlanResult:
    """What tracing a model gave.

    Attributes:
        plan: None when the converter itself has to write the GGUF.
        reason: why there is no plan, for messages.
        is_convertible: whether the converter is known to support the model.
    """

    plan: ConversionPlan | None = None
    reason: str = ""
    is_convertible: bool = False


def find_plan(skeleton: ModelSkeleton, gguf_type: str, toolchain: Toolchain, log: Path) -> PlanResult:
    """Return the plan for a GGUF of `gguf_type` ("f16", "bf16" or "f32"); trace it when it is not in the cache.

    A user's own llama.cpp gets no plan, because it may change from one day to the next.
    """
    if os.environ.get(_SWITCH) == "off":
        return PlanResult(reason=f"{_SWITCH} is off")
    if toolchain.version == "own":
        return PlanResult(reason="the converter is not the pinned one")
    folder = plan_folder(skeleton, gguf_type, toolchain)
    if (folder / PLAN).is_file():
        with suppress(OSError, StorageError):
            return read_plan(folder)
        remove(folder)
    with temporary_folder(skeleton) as model:
        traced = model.with_name(f"{model.name}.plan")
        traced.mkdir()
        arguments = (str(toolchain.root), str(model), gguf_type, str(traced))
        module = "kolotune.gguf.conversion_tracing"
        try:
            code = child_process.run(module, *arguments, log=log, otherwise=ToolchainError, env=OFFLINE)
        except ToolchainError as error:
            return PlanResult(reason=error.cause)
        if code != 0:
            return PlanResult(reason=local.last_lines(log))
        flush(traced)
        with suppress(OSError):  # another process was quicker; its plan is the same
            traced.rename(folder)
    _remove_old(folder)
    return read_plan(folder)


def is_planned(skeleton: ModelSkeleton, gguf_type: str, toolchain: Toolchain) -> bool:
    """Whether the result of tracing is in the cache."""
    return (plan_folder(skeleton, gguf_type, toolchain) / PLAN).is_file()


def plan_folder(skeleton: ModelSkeleton, gguf_type: str, toolchain: Toolchain) -> Path:
    """Return the folder in the cache that holds the plan, or will."""
    name = f"{skeleton.digest()}-{gguf_type}-{writer_form.wanted_form()}-{toolchain.version}-{_VERSION}"
    return cache_folder("conversions") / name


@contextmanager
def temporary_folder(skeleton: ModelSkeleton, *, zeros: bool = False) -> Iterator[Path]:
    """Write the skeleton as a folder that is removed when the block ends; see `ModelSkeleton.write`."""
    cache = cache_folder("conversions")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as parent:
        yield skeleton.write(Path(parent), zeros=zeros)


def read_plan(folder: Path) -> PlanResult:
    """Read what `conversion_tracing` wrote.

    Raises:
        OSError, StorageError: the files are missing or damaged.
    """
    stored = typed_storage.read(StoredPlan, folder / PLAN)
    if stored.reason:
        return PlanResult(reason=stored.reason, is_convertible=True)
    return PlanResult(ConversionPlan((folder / HEADER).read_bytes(), stored.tensors), is_convertible=True)


def _remove_old(newest: Path) -> None:
    """Keep the latest plans only: a template that contains the date gives a new plan every day."""
    older = [path for path in newest.parent.iterdir() if path != newest and (path / PLAN).is_file()]
    for path in sorted(older, key=lambda folder: folder.stat().st_mtime)[: 1 - _MOST_PLANS]:
        with suppress(OSError):
            remove(path)
