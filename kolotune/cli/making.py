"""The verbs that make things: run, each stage, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR, FIELDS, Config
from kolotune.foundation.errors import ConfigError, RunFolderError
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.retention import left_out
from kolotune.weights import adapter as adapters

from . import hints
from .comparison_table import showing
from .options import ConfigFile, Data, Json, config_of, given, reporter, show, with_options
from .proving import reporting

Run = Annotated[Path, typer.Argument(help="The run folder.")]


Lean = Annotated[Optional[bool], typer.Option("--lean/--no-lean", help=FIELDS["lean"].metadata["help"])]  # noqa: UP045


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (run, prepare, train, merge, convert, quantize, modelfile, compare, export):
        app.command()(verb)


@with_options("data", "model", "training", "machines", "export", "comparison")
def run(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """All stages: from chats to Modelfiles, each stage only if something it depends on changed."""
    from kolotune.pipeline import run as pipeline

    say = reporter(json)
    resolved = config_of(flags, data, config)
    if not resolved.train_data:
        raise hints.no_chats("run")
    hints.require_files((*resolved.train_data, *resolved.eval_data))
    show(resolved, say)
    folder = RunFolder(resolved.output_dir)
    with showing(folder, say, wanted=resolved.compare), reporting(folder, say):
        pipeline.run(resolved, say)
    say.success(f"Done: {folder.root}")
    shown = hints.as_typed(folder.root)
    say.note(f"talk to it:          kolotune chat {shown}")
    say.note(f"put it into Ollama:  kolotune install {shown} my-model")
    return 0


@with_options("data", "model", "export", leave_out=("quantization", "system", "parameter", "merge_dtype", "lean"))
def prepare(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """Chats to tokens with labels."""
    from kolotune.pipeline import run as pipeline

    folder = Path(given(flags).get("output_dir", DEFAULT_OUTPUT_DIR))
    saved = RunFolder(folder).config
    resolved = config_of(flags, data, config, saved if saved.is_file() else None)
    if not resolved.train_data:
        raise hints.no_chats("prepare")
    hints.require_files((*resolved.train_data, *resolved.eval_data))
    pipeline.run(resolved, reporter(json), ["prepare"])
    return 0


@with_options("model", "training", "machines")
def train(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Prepared tokens to an adapter."""
    return _stage("train", run, json, flags)


@with_options()
def merge(
    run: Run = DEFAULT_OUTPUT_DIR,
    adapter: Annotated[Optional[Path], typer.Option(help="An adapter made elsewhere, in PEFT's format.")] = None,  # noqa: UP045
    base: Annotated[Optional[str], typer.Option(help="Its base model; default: the one it names.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Folder to make; may not exist yet.")] = None,  # noqa: UP045
    merge_dtype: Annotated[Optional[str], typer.Option(metavar="f16|bf16|fp32", help="How weights are stored.")] = None,  # noqa: UP045
    lean: Lean = None,
    json: Json = False,
) -> int:
    """An adapter and its base to one model folder; with --adapter and --out outside a run too."""
    flags = {"merge_dtype": merge_dtype, "lean": lean}
    if adapter is None and out is None and base is None:
        return _stage("merge", run, json, flags)
    if adapter is None or out is None:
        raise ConfigError("merge: --adapter and --out go together", "kolotune merge --adapter A --out M")
    return _merge_elsewhere(adapter, base, out, config_of(flags), json)


@with_options()
def convert(run: Run = DEFAULT_OUTPUT_DIR, lean: Lean = None, json: Json = False) -> int:
    """The merged model to an unquantized GGUF."""
    return _stage("convert", run, json, {"lean": lean})


@with_options()
def quantize(
    run: Run = DEFAULT_OUTPUT_DIR,
    quantization: Annotated[Optional[str], typer.Option(help="One or several, as Q4_K_M,Q8_0.")] = None,  # noqa: UP045
    lean: Lean = None,
    json: Json = False,
) -> int:
    """The unquantized GGUF to smaller ones."""
    return _stage("quantize", run, json, {"quantization": quantization, "lean": lean})


@with_options("export", leave_out=("output_dir", "merge_dtype", "compare"))
def modelfile(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Modelfiles for the GGUFs."""
    return _stage("modelfile", run, json, flags)


@with_options("comparison")
def compare(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Adapter, merged model, GGUFs and what Ollama serves, held against each other on held-out chats."""
    folder, say = RunFolder(run.absolute()), reporter(json)
    with showing(folder, say), reporting(folder, say):
        return _stage("compare", run, json, {**flags, "compare": True})


@with_options("export", leave_out=("compare",))
def export(
    folder: Annotated[Path, typer.Argument(help="An adapter or a merged model, made elsewhere.")],
    base: Annotated[Optional[str], typer.Option(help="The adapter's base model; default: the one it names.")] = None,  # noqa: UP045
    json: Json = False,
    **flags: Any,
) -> int:
    """An adapter or a merged model made elsewhere to GGUF and Modelfile, without training."""
    from kolotune.pipeline import run as pipeline

    say = reporter(json)
    source = folder.absolute()
    wanted = given(flags)
    if adapters.is_adapter(source):
        wanted["base_model"] = base or _named_base(source)
        names = ["merge", "convert", "quantize", "modelfile"]
    else:
        wanted["base_model"] = str(source)
        names = ["convert", "quantize", "modelfile"]
    resolved = config_of(wanted)
    show(resolved, say)
    run_folder = pipeline.run(resolved, say, names, source)
    say.success(f"Done: {run_folder.root}")
    return 0


def _stage(name: str, root: Path, json: bool, flags: dict[str, Any]) -> int:
    """Runs one stage of a run folder whose earlier stages are done."""
    from kolotune.pipeline import run as pipeline

    folder = RunFolder(root.absolute()).require()
    resolved = config_of(flags, saved=folder.config)
    if name in left_out(resolved):
        raise ConfigError(
            f"{name}: a lean run keeps nothing that it would make",
            f"With --no-lean it is made: kolotune {name} {hints.as_typed(folder.root)} --no-lean",
        )
    for each in pipeline.status(folder, resolved):
        if each.name == name:
            break
        if each.has_work:
            raise RunFolderError(
                f"{folder.root}: {each.name} comes before {name} and is not done ({'; '.join(each.why)})",
                f"Run `kolotune {each.name} {hints.as_typed(folder.root)}` first, or `kolotune run` for all stages.",
            )
    resolved = dataclasses.replace(resolved, output_dir=folder.root)
    pipeline.run(resolved, reporter(json), [name], pipeline.recorded_source(folder), again=[name])
    return 0


def _merge_elsewhere(adapter: Path, base: str | None, out: Path, config: Config, json: bool) -> int:
    from kolotune.base_models import catalog
    from kolotune.foundation.files import replacing
    from kolotune.stages.merge import merge_adapter
    from kolotune.weights.merge import tokenizer_of

    say = reporter(json)
    if out.exists():
        raise ConfigError(f"{out}: is there already", "Name a folder that does not exist; nothing is overwritten.")
    base_folder = catalog.resolve(base or _named_base(adapter), None, say)
    with replacing(out.absolute()) as partial:
        partial.mkdir()
        merge_adapter(
            adapter,
            base_folder,
            partial,
            tokenizer=tokenizer_of(adapter, base_folder),
            dtype=config.merge_dtype,
            reporter=say,
        )
    say.success(f"merged: {out}")
    return 0


def _named_base(adapter: Path) -> str:
    name = adapters.read(adapter).base_name
    if not name:
        raise ConfigError(f"{adapter}: does not name its base model", "Give it with --base.")
    return name
