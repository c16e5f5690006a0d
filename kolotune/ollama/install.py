"""A run's model into Ollama, out of it, and a talk with it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kolotune.foundation.errors import ArtifactError, ConfigError, OllamaError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.installed import InstalledModel, read_installed, write_installed
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import Result, open_result

from . import parameters as known
from .client import OllamaClient, release
from .confirmation import differences
from .model_name import check_name
from .modelfile import Description, describe

_OLDEST = (0, 5, 5)  # its create takes files by digest and texts as JSON
_READS_JINJA = (0, 30, 0)  # before, a model without TEMPLATE gets no template at all unless Ollama knows it
_KEEPS_ITS_MEMORY = (0, 17, 1)


def install(
    run: RunFolder,
    name: str,
    reporter: Reporter,
    *,
    quantization: str | None = None,
    system: str | None = None,
    parameters: Sequence[str] = (),
    force: bool = False,
    server: OllamaClient | None = None,
) -> None:
    """Puts a GGUF of a run into Ollama, with what its Modelfile says, and asks whether that has arrived.

    Args:
        run: the run folder.
        name: of the model in Ollama.
        reporter: told what is done.
        quantization: which GGUF; "none" for the unquantized; None: the run's first.
        system: in place of the Modelfile's; any text, as it needs no Modelfile.
        parameters: "name=value" each, in place of the Modelfile's of that name.
        force: replace another model of that name.
        server: None: the one that OLLAMA_HOST names.

    Raises:
        ConfigError: the name can't be one, or is another model's.
        RunFolderError, ArtifactError: there is no such result.
        OllamaDownError, OllamaError: there is no server, or it fails, or shows something else than was sent.
    """
    check_name(name)
    result = open_result(run, quantization)
    wanted = _changed(described(result), system, parameters)
    server = server or OllamaClient()
    _look_at_version(server, wanted, reporter)
    shown = server.show(name)
    if shown is not None and not force:
        if differences(shown, wanted, result.sha256):
            raise ConfigError(
                f"there is another model {name} in Ollama", "Choose another name, or replace it with --force."
            )
        _finish(run, result, name, server, reporter, f"{name} is in Ollama already, the same")
        return
    _send(result, server, reporter)
    reporter.doing(f"making {name}")
    for status in server.create(name, wanted, {result.gguf.name: result.sha256}):
        reporter.note(f"Ollama: {status}")
    shown = server.show(name)
    found = ["there is no such model"] if shown is None else differences(shown, wanted, result.sha256)
    if found:
        raise OllamaError(
            f"{name} in Ollama is not what was sent: {'; '.join(found)}",
            f"Take it out (kolotune uninstall {name}) and report this with the server's version.",
        )
    _finish(run, result, name, server, reporter, f"{name} is in Ollama ({result.gguf.name})")


def uninstall(name: str, reporter: Reporter, server: OllamaClient | None = None) -> None:
    """Takes a model out of Ollama.

    Raises:
        ConfigError: the name can't be one, or there is no such model.
        OllamaDownError, OllamaError: there is no server, or it fails.
    """
    check_name(name)
    server = server or OllamaClient()
    if not server.delete(name):
        raise ConfigError(f"there is no model {name} in Ollama", "`ollama list` shows what is there.")
    reporter.success(f"{name} is no longer in Ollama")


def installed_name(run: RunFolder) -> str:
    """The name under which a run was last installed.

    Raises:
        ConfigError: it was not.
    """
    run.require()
    model = read_installed(run)
    if model is None:
        raise ConfigError(
            f"{run.root}: has not been put into Ollama", f"Do that first: kolotune install {run.root} NAME"
        )
    return model.name


class OllamaChat:
    """A conversation with a model in Ollama.

    Args:
        name: of the model.
        system: in place of the model's own; None: that.
        server: None: the one that OLLAMA_HOST names.
    """

    def __init__(self, name: str, system: str | None = None, server: OllamaClient | None = None) -> None:
        self._name, self._server = check_name(name), server or OllamaClient()
        self._messages = [{"role": "system", "content": system}] if system is not None else []

    def ask(
        self, text: str, *, temperature: float | None = None, max_tokens: int | None = None, seed: int | None = None
    ) -> Iterator[str]:
        """The answer to `text`, piece by piece; where nothing is said the model's own parameters count.

        Raises:
            OllamaDownError, OllamaError: there is no server or no such model, or the answer breaks off.
        """
        wishes = {"temperature": temperature, "num_predict": max_tokens, "seed": seed}
        options = {name: value for name, value in wishes.items() if value is not None}
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for piece in self._server.chat(self._name, messages, options):
            pieces.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def described(result: Result) -> Description:
    """What the Modelfile beside a GGUF says, with what its user has changed.

    Raises:
        ArtifactError: Ollama would refuse it, or it speaks of another file.
    """
    try:
        text = result.modelfile.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{result.modelfile}: is no UTF-8", "Write it anew with `kolotune modelfile`.") from None
    found = describe(text)
    if Path(found.from_) != Path(result.gguf.name):
        raise ArtifactError(
            f"{result.modelfile}: its FROM is {found.from_}, not ./{result.gguf.name}",
            "Choose the GGUF with --quantization, and leave FROM as it was.",
        )
    return found


def _changed(found: Description, system: str | None, parameters: Sequence[str]) -> Description:
    """The description with what the command line says in place of some of it."""
    pairs = [each.partition("=")[::2] for each in parameters]
    own = known.validate([(name.strip(), value) for name, value in pairs])
    names = {name for name, _ in own}
    kept = tuple(pair for pair in found.parameters if pair[0] not in names)
    return replace(found, system=found.system if system is None else system or None, parameters=(*kept, *own))


def _look_at_version(server: OllamaClient, wanted: Description, reporter: Reporter) -> None:
    version = server.version()
    numbers = release(version)
    if not numbers:
        reporter.note(f"Ollama at {server.url} does not say which version it is ({version or 'nothing'})")
        return
    if numbers < _OLDEST:
        raise OllamaError(
            f"Ollama at {server.url} is {version}; kolotune needs {'.'.join(map(str, _OLDEST))} or newer",
            "Update it; the newest is on ollama.com.",
        )
    if numbers < _KEEPS_ITS_MEMORY:
        reporter.warning(
            f"Ollama {version} has a hole: whoever reaches it can read its memory through /api/create; "
            f"{'.'.join(map(str, _KEEPS_ITS_MEMORY))} closes it"
        )
    if wanted.template is None and numbers < _READS_JINJA:
        reporter.warning(
            f"this model's template can't be written for Ollama, and Ollama {version} does not read the one in the "
            f"GGUF: the model may ramble; {'.'.join(map(str, _READS_JINJA))} reads it"
        )


def _send(result: Result, server: OllamaClient, reporter: Reporter) -> None:
    if server.has_blob(result.sha256):
        reporter.note(f"Ollama has {result.gguf.name} already")
        return
    size = result.gguf.stat().st_size
    reporter.doing(f"sending {result.gguf.name} ({format_size(size)}) to {server.url}")
    with reporter.progress("sending") as progress:
        server.send_blob(result.gguf, result.sha256, lambda sent: progress.update(sent, size))


def _finish(run: RunFolder, result: Result, name: str, server: OllamaClient, reporter: Reporter, text: str) -> None:
    write_installed(run, InstalledModel(name, result.quantization))
    digest = server.digest(name)
    reporter.success(text)
    reporter.note(f"weights sha256:{result.sha256[:12]}, model {digest.removeprefix('sha256:')[:12]}, as sent")
    reporter.note(f"talk to it:  kolotune chat {run.root} --ollama, or: ollama run {name}")
