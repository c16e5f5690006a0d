"""Install a run's model in Ollama, and uninstall it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.errors import ArtifactError, ConfigError, ModelError, OllamaError, TemplateError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.installed import InstalledModel, read_installed, write_installed
from kolotune.run_folder.layout import HELD_OUT_CHATS, RunFolder
from kolotune.run_folder.results import Result, open_result
from kolotune.weights.gguf_metadata import read_metadata

from .client import OllamaClient
from .compatibility import check_version
from .confirmation import SentModel, find_differences
from .model_name import check_name
from .modelfile import ModelDescription
from .modelfile_parser import read_description
from .parameters import validate
from .prompt_path import PromptPath
from .prompts_to_ask import prompts_to_ask
from .server_proof import ProofKind, ServerProof, can_render, describe, prove


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
    """Install a GGUF of a run in Ollama, with what its Modelfile says, and prove that it is served as trained.

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
        OllamaDownError, OllamaError: there is no server, or it fails, or shows something else than was sent, or gives
            the model other prompts than training.
    """
    check_name(name)
    result = open_result(run, quantization)
    description = _with_changes(read_description(result), system, parameters)
    client = client or OllamaClient()
    model = SentModel(description, result.sha256, read_metadata(result.gguf))
    model = replace(model, version=check_version(client, model.sources(), reporter))
    shown = client.show(name)
    if shown is not None and not force:
        if not model.is_stored_as_sent or find_differences(shown, model):
            raise ConfigError(
                f"Ollama already has a different model {name}", "Choose another name, or replace it with --force."
            )
        success = f"{name} is already in Ollama, unchanged"
    else:
        _send(result, client, reporter)
        reporter.doing(f"creating {name}")
        for status in client.create(name, description, {result.gguf.name: result.sha256}):
            reporter.note(f"Ollama: {status}")
        shown = client.show(name)
        success = f"{name} is in Ollama ({result.gguf.name})"
    _confirm(shown, name, model)
    _prove(run, name, model, shown or {}, client, reporter)
    _finish(run, result, name, client, reporter, success)
    if not model.is_stored_as_sent:
        reporter.warning(
            f"{result.gguf.name} was written by an earlier version; Ollama rewrites it, so its hash can't be compared"
        )


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


def _confirm(shown: JsonObject | None, name: str, model: SentModel) -> None:
    """Check what the server shows.

    Raises:
        OllamaError: it is not what was sent.
    """
    differences = [] if shown is None else find_differences(shown, model)
    if shown is not None and not differences:
        return
    problem = "; ".join(map(str, differences)) or "there is no such model"
    hint = f"Remove it (kolotune uninstall {name}) and report this with the server's version."
    if any(one.part == "template" and one.shown for one in differences):
        hint = f"Unset OLLAMA_GO_TEMPLATE where the server is started, or remove it: kolotune uninstall {name}"
    raise OllamaError(f"{name} in Ollama is not what was sent: {problem}", hint)


def _prove(
    run: RunFolder, name: str, model: SentModel, shown: JsonObject, client: OllamaClient, reporter: Reporter
) -> None:
    """Compare the server's prompts with training's, and report the result.

    Raises:
        OllamaError: a prompt differs.
    """
    rule = model.rule(shown)
    if rule is not None and rule.path is PromptPath.NONE:
        return  # `check_version` has said so
    proof = ServerProof(ProofKind.NOT_INSTALLED)
    if can_render():
        reporter.doing("comparing prompts with training's")
        try:
            folder = trained_folder(run)
            prompts = prompts_to_ask(
                folder, run.prepared / HELD_OUT_CHATS, model.description, model.longest_prompt,
                rule.capabilities if rule is not None else (),
            )  # fmt: skip
        except (ArtifactError, ModelError, TemplateError) as error:
            reporter.note(f"prompts were not compared: {error.cause}")
            return
        proof = prove(client, name, prompts, folder)
    if not proof.differences:
        reporter.note(describe(proof, rule))
        return
    problem = f"{len(proof.differences)} of {proof.prompts} prompts are not as trained; {proof.differences[0]}"
    if rule is not None and rule.path is PromptPath.RENDERER:
        reporter.warning(f"Ollama renders {name} in its own code, and {problem}")
        return
    raise OllamaError(f"{name} is in Ollama, but {problem}", f"Remove it: kolotune uninstall {name}")


def _finish(run: RunFolder, result: Result, name: str, client: OllamaClient, reporter: Reporter, text: str) -> None:
    write_installed(run, InstalledModel(name, result.quantization))
    digest = client.digest(name)
    reporter.success(text)
    reporter.note(f"weights sha256:{result.sha256[:12]}, model {digest.removeprefix('sha256:')[:12]}, as sent")
    reporter.note(f"chat with it:  kolotune chat {run.root} --ollama, or: ollama run {name}")
