"""A verb with ``--container``: it runs in the container, its files go in and its results come out.

The request is taken out of the arguments before the verb sees them, and the meaning of the verb's parameters is read
from their roles. So no verb needs to know about containers.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from kolotune.foundation import config as configs
from kolotune.foundation.chat_paths import files_of
from kolotune.foundation.config import OPTIONS, Kind, normalize
from kolotune.foundation.errors import ConfigError, DataError
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES, Secret
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.source import read_source
from kolotune.runners.container import names
from kolotune.runners.container.inputs import InputSender
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.results import send_run
from kolotune.runners.container.verb import ContainerVerb, run_verb
from kolotune.runners.container.volume import Volume, exists

from .container_request import FLAG, LEAVE_INSIDE, WITH_CHECKPOINTS, ContainerRequest, parse_request
from .options import reporter, resolve_flags
from .parameters import FileRole, roles_of
from .piped import is_pipe, saved_pipe

if TYPE_CHECKING:
    from typer.core import TyperGroup

HELP = (
    f"{FLAG} [NAME] after any verb runs it in a container (see `kolotune container --help`): files go in, results "
    f"come out, unless {LEAVE_INSIDE} is given; training checkpoints come out only {WITH_CHECKPOINTS}."
)
# Verbs whose work is on this machine, wherever the model was trained.
ON_THIS_MACHINE = frozenset(
    {"cancel", "follow", "init", "install", "launch", "push", "rebuild", "runs", "serve", "uninstall"}
)
# Verbs that change nothing that would have to come out.
READ_ONLY = frozenset({"check", "chat", "doctor", "models", "plan", "status", "verify", "version"})


def main(command: TyperGroup, arguments: Sequence[str]) -> object:
    """Run a verb, in the container if the arguments say so; return what the verb returns."""
    request = parse_request(arguments, value_options(command))
    if request is None:
        return command.main(list(arguments), prog_name="kolotune", standalone_mode=False)
    verb = request.rest[0] if request.rest else ""
    if verb not in command.commands or verb in ON_THIS_MACHINE or {"-h", "--help"} & set(request.rest):
        return command.main(request.rest, prog_name="kolotune", standalone_mode=False)
    if verb == "container":
        raise ConfigError(
            "container: give the name as an argument, without --container", "kolotune container start NAME"
        )
    call = VerbCall(command, request.rest)
    # An Ollama server, a cluster and other machines are reached from this machine.
    if call.values.get("ollama") or call.values.get("on"):
        return command.main(request.rest, prog_name="kolotune", standalone_mode=False)
    return call.carry_out(request)


def value_options(command: TyperGroup) -> dict[str, frozenset[str]]:
    """Return the options of each verb that take a value."""
    return {
        name: frozenset(
            flag for each in verb.params if not getattr(each, "is_flag", True) for flag in each.opts if flag[:1] == "-"
        )
        for name, verb in command.commands.items()
    }


class VerbCall:
    """A verb with its arguments, parsed.

    Attributes:
        values: of all its parameters, by name.
        given: names of the parameters on the command line.
        config: the options as the verb will see them; None if it has none.
    """

    def __init__(self, command: TyperGroup, arguments: Sequence[str]) -> None:
        """Raise what is wrong with the arguments, before anything is sent."""
        self.verb = arguments[0]
        verb = command.commands[self.verb]
        parent = command.make_context("kolotune", list(arguments))
        context = verb.make_context(self.verb, list(arguments[1:]), parent=parent)
        self._parameters = {str(each.name): each for each in verb.params}
        self._roles = roles_of(inspect.unwrap(verb.callback)) if verb.callback else {}
        self.values: dict[str, object] = dict(context.params)
        self.given = {
            name
            for name in self._parameters
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        for name in self.given:
            if self._roles.get(name) is FileRole.WRITTEN_HERE:
                flag = self._parameters[name].opts[0]
                raise ConfigError(
                    f"{self.verb} {flag}: what runs in a container writes no file of this machine meanwhile",
                    f"Leave out {flag}, or --container.",
                )
        self._keep_pipes()
        self.config = self._resolve()

    def _keep_pipes(self) -> None:
        """Put the files that pipes are kept in for the pipes, which can be read once."""
        for name in self.given:
            if self._roles.get(name) is FileRole.CHATS:
                paths = _several(self.values[name])
                self.values[name] = [saved_pipe(path) if is_pipe(path) else path for path in paths]

    def _resolve(self) -> configs.Config | None:
        options = {name for name in self._parameters if name in OPTIONS and self.verb in OPTIONS[name].verbs}
        flags = {name: self.values[name] for name in self.given & options}
        if "config" in self._parameters:
            data, file = (self.values.get(name) if name in self.given else None for name in ("data", "config"))
            return resolve_flags(flags, _paths(data), file if isinstance(file, Path) else None, downloads=False)
        return resolve_flags(flags, downloads=False) if options else None

    def carry_out(self, request: ContainerRequest) -> int:
        """Send the files in, run the verb in the container, bring results out; return the verb's exit code."""
        from kolotune.foundation.cache import cache_folder
        from kolotune.foundation.hashing import Hasher
        from kolotune.runners.container.docker import Docker

        say = reporter("json" in self.given)
        token = self.token()
        docker = Docker()
        volume = Volume(docker, docker.require_running(request.name))
        paths = PathMap(token)
        hasher = Hasher(cache_folder("container") / "hashes.json")
        sender = InputSender(volume, hasher, paths, say)
        run, out = self.run_folder(), self.new_folder()
        if run is not None:
            host, inside = run
            paths.add(inside, host)
            self._seed(volume, sender, host, inside)
        order = ContainerVerb(
            argv=self.argv(sender, run, out),
            paths=paths,
            run=run if self.verb not in READ_ONLY else None,
            out=out,
            token=token,
            as_events="json" in self._parameters,
            raw="json" in self.given,
            takes_input="prompt" in self._parameters and "prompt" not in self.given,
        )
        if out is not None:
            paths.add(out[1], out[0])
        hasher.save()
        return run_verb(
            volume, order, say, leave_inside=request.leave_inside, with_checkpoints=request.with_checkpoints
        )

    def token(self) -> Secret:
        """Return the hub's token from the options or the environment; an empty one if there is none."""
        from kolotune.base_models.hub import read_token

        source = self.config.hf_token if self.config else None
        in_environment = (Secret(os.environ.get(name, "")) for name in HUB_TOKEN_VARIABLES)
        return read_token(source) or next(filter(None, in_environment), Secret())

    def run_folder(self) -> tuple[Path, PurePosixPath] | None:
        """Return the run folder here and in the container; None if the verb has none."""
        if {"adapter", "out"} & self.given:
            return None
        if "output_dir" in self._parameters and self.config is not None:
            host = Path(os.path.abspath(self.config.output_dir))
        elif "run" in self._parameters:
            host = Path(os.path.abspath(str(self.values["run"])))
        else:
            return None
        return host, names.run_folder(host)

    def new_folder(self) -> tuple[Path, PurePosixPath] | None:
        """Return the folder that the verb makes outside of a run, here and in the container."""
        if "out" not in self.given:
            return None
        host = Path(os.path.abspath(str(self.values["out"])))
        if host.exists():
            raise ConfigError(f"{host}: already exists", "Name a new folder; nothing is overwritten.")
        return host, names.OUTSIDE / os.urandom(6).hex() / names.run_folder(host).name

    def argv(
        self, sender: InputSender, run: tuple[Path, PurePosixPath] | None, out: tuple[Path, PurePosixPath] | None
    ) -> list[str]:
        """Return the command line for the container, with the locations of files there."""
        options: list[str] = []
        positional: list[str] = []
        for name, parameter in self._parameters.items():
            role, value = self._roles.get(name), self.values.get(name)
            if role is FileRole.RUN_FOLDER and run is not None:
                value = run[1]
            elif name == "json":
                value = True
            elif name not in self.given or role is FileRole.NOT_SENT:
                continue
            elif role is FileRole.NEW_FOLDER and out is not None:
                value = out[1]
            else:
                value = self._inside(role, value, sender)
            if parameter.param_type_name == "argument":
                positional += map(str, _several(value))
            elif isinstance(value, bool):
                options.append((parameter.opts if value else parameter.secondary_opts)[0])
            else:
                options += [f"{parameter.opts[0]}={each}" for each in _several(value)]
        return [self.verb, *options, *(["--", *positional] if positional else [])]

    def _inside(self, role: FileRole | None, value: object, sender: InputSender) -> object:
        """Return a parameter's value, or the location in the container of the file that it names."""
        if role is FileRole.CHATS:
            return [inside for each in _several(value) for inside in _send_chats(Path(str(each)), sender)]
        if role is FileRole.INPUT:
            return sender.send(Path(os.path.abspath(str(value))))
        if role is FileRole.CONFIG_FILE:
            file = Path(str(value))
            text = _options_inside(configs.load_file(file), file.absolute().parent, sender)
            return sender.send_text("kolotune.yaml", text, file)
        if role is FileRole.BASE_MODEL:
            return _send_base(normalize("base_model", value, Path.cwd()), sender)
        return value

    def _seed(self, volume: Volume, sender: InputSender, host: Path, inside: PurePosixPath) -> None:
        """Send the run folder if it was made here and the container does not have it."""
        folder = RunFolder(host)
        if not folder.config.is_file() or exists(volume, inside):
            return
        reporter("json" in self.given).doing(f"sending {host}")
        rewritten = {folder.config: _options_inside(configs.load_file(folder.config), host, sender)}
        if (source := read_source(folder)) is not None:
            rewritten[folder.source] = json.dumps({"source": str(sender.send(source))})
        send_run(volume, folder, inside, rewritten)


def _options_inside(values: Mapping[str, object], folder: Path, sender: InputSender) -> str:
    """Return a file's options as YAML with the locations of their files in the container.

    The run folder and the token are left out: the verb gets them in other ways.
    """
    import yaml

    inside: dict[str, object] = {}
    for name, value in values.items():
        kind = OPTIONS[name].kind
        if kind in (Kind.FOLDER, Kind.SECRET_SOURCE) or value is None:
            continue
        if kind is Kind.CHAT_FILES:
            files = _paths(normalize(name, value, folder))
            inside[name] = [each for path in files for each in _send_chats(path, sender)]
        elif kind in (Kind.FILE, Kind.ADAPTER):
            inside[name] = str(sender.send(Path(str(normalize(name, value, folder)))))
        elif kind is Kind.BASE_MODEL:
            inside[name] = str(_send_base(normalize(name, value, folder), sender))
        else:
            inside[name] = value
    return yaml.safe_dump(inside, sort_keys=False, allow_unicode=True)


def _send_chats(path: Path, sender: InputSender) -> list[str]:
    """Return the files of chats in the container; a data set of the hub stays a name, and is downloaded there."""
    from kolotune.base_models.hub_datasets import reference_of

    reference = reference_of(path)
    if reference is not None:
        return [str(reference)]
    files = files_of(Path(os.path.abspath(path.expanduser())))
    for file in files:
        if file.is_dir():
            raise DataError(
                f"{file}: is a folder without files of chats, or with some that are kept for testing or in data",
                "Name the files to train on.",
            )
    return [str(sender.send(file)) for file in files]


def _send_base(base: object, sender: InputSender) -> object:
    """Return a base model's folder in the container; a name stays a name."""
    return sender.send(Path(base)) if isinstance(base, str) and Path(base).is_absolute() else base


def _paths(value: object) -> list[Path]:
    return [each for each in value if isinstance(each, Path)] if isinstance(value, Iterable) else []


def _several(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
