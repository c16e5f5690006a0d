"""Install a run's model in Ollama, and uninstall it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kolotune.foundation.errors import ConfigError, OllamaError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.installed import InstalledModel, read_installed, write_installed
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import Result, open_result

from .client import OllamaClient
from .compatibility import check_version
from .confirmation import find_differences
from .model_name import check_name
from .modelfile import ModelDescription
from .modelfile_parser import read_description
from .parameters import validate


def install(
    run: RunFolder,
    name: str,
    reporter: Reporter,
    *,
    quantization: str | None = None,
    system: str | None = None,
    parameters: Sequence[str] = (),
    force: bool = False,
    client: OllamaClient | None = None,
) -> None:
    """Install a GGUF of a run in Ollama, with what its Modelfile says, and confirm that it arrived.

    Args:
        run: the run folder.
        name: of the model in Ollama.
        reporter: shows the progress.
        quantization: which GGUF; "none" for the unquantized; None: the run's first.
        system: replaces the Modelfile's; any text, because it is sent as JSON.
        parameters: "name=value" each; they replace the Modelfile's of that name.
        force: replace a different model of that name.
        client: None: the server that OLLAMA_HOST names.

    Raises:
        ConfigError: the name is invalid, or belongs to a different model.
        RunFolderError, ArtifactError: there is no such result.
        OllamaDownError, OllamaError: there is no server, or it fails, or shows something else than was sent.
    """
    check_name(name)
    result = open_result(run, quantization)
    description = _with_changes(read_description(result), system, parameters)
    client = client or OllamaClient()
    check_version(client, description, reporter)
    shown = client.show(name)
    if shown is not None and not force:
        if find_differences(shown, description, result.sha256):
            raise ConfigError(
                f"Ollama already has a different model {name}", "Choose another name, or replace it with --force."
            )
        _finish(run, result, name, client, reporter, f"{name} is already in Ollama, unchanged")
        return
    _send(result, client, reporter)
    reporter.doing(f"creating {name}")
    for status in client.create(name, description, {result.gguf.name: result.sha256}):
        reporter.note(f"Ollama: {status}")
    _confirm(client, name, description, result)
    _finish(run, result, name, client, reporter, f"{name} is in Ollama ({result.gguf.name})")


def uninstall(name: str, reporter: Reporter, client: OllamaClient | None = None) -> None:
    """Remove a model from Ollama.

    Raises:
        ConfigError: the name is invalid, or there is no such model.
        OllamaDownError, OllamaError: there is no server, or it fails.
    """
    check_name(name)
    client = client or OllamaClient()
    if not client.delete(name):
        raise ConfigError(f"there is no model {name} in Ollama", "`ollama list` shows the models.")
    reporter.success(f"{name} is no longer in Ollama")


def installed_name(run: RunFolder) -> str:
    """Return the name under which a run was last installed.

    Raises:
        ConfigError: it was not installed.
    """
    run.require()
    model = read_installed(run)
    if model is None:
        raise ConfigError(
            f"{run.root}: is not installed in Ollama", f"Install it first: kolotune install {run.root} NAME"
        )
    return model.name


def _with_changes(description: ModelDescription, system: str | None, parameters: Sequence[str]) -> ModelDescription:
    """The description with the values of the command line."""
    pairs = [text.partition("=")[::2] for text in parameters]
    own = validate([(name.strip(), value) for name, value in pairs])
    names = {name for name, _ in own}
    kept = tuple(pair for pair in description.parameters if pair[0] not in names)
    return replace(
        description, system=description.system if system is None else system or None, parameters=(*kept, *own)
    )


def _send(result: Result, client: OllamaClient, reporter: Reporter) -> None:
    if client.has_blob(result.sha256):
        reporter.note(f"Ollama already has {result.gguf.name}")
        return
    size = result.gguf.stat().st_size
    reporter.doing(f"sending {result.gguf.name} ({format_size(size)}) to {client.url}")
    with reporter.progress("sending") as progress:
        client.send_blob(result.gguf, result.sha256, lambda sent: progress.update(sent, size))


def _confirm(client: OllamaClient, name: str, description: ModelDescription, result: Result) -> None:
    shown = client.show(name)
    if shown is None:
        problem = "there is no such model"
    else:
        problem = "; ".join(map(str, find_differences(shown, description, result.sha256)))
    if problem:
        raise OllamaError(
            f"{name} in Ollama is not what was sent: {problem}",
            f"Remove it (kolotune uninstall {name}) and report this with the server's version.",
        )


def _finish(run: RunFolder, result: Result, name: str, client: OllamaClient, reporter: Reporter, text: str) -> None:
    write_installed(run, InstalledModel(name, result.quantization))
    digest = client.digest(name)
    reporter.success(text)
    reporter.note(f"weights sha256:{result.sha256[:12]}, model {digest.removeprefix('sha256:')[:12]}, as sent")
    reporter.note(f"chat with it:  kolotune chat {run.root} --ollama, or: ollama run {name}")
