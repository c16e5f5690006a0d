"""``--container [NAME]`` on any verb: the verb runs in the container, its files go in and its results come out.

It is taken out of the arguments before the verb sees them, and what the verb's parameters mean is known by their
names: inputs, run folders, base models. So a verb needs to know nothing of containers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError, DataError
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES, Secret
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container import names
from kolotune.runners.container.inputs import InputSender
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.results import send_run
from kolotune.runners.container.verb import ContainerVerb, run_verb
from kolotune.runners.container.volume import Volume, exists

from .options import config_of, reporter

FLAG, LEAVE_INSIDE, WITH_CHECKPOINTS = "--container", "--leave-inside", "--with-checkpoints"
HELP = (
    f"{FLAG} [NAME] after any verb runs it in a container (see `kolotune container --help`): files go in, results "
    f"come out, unless {LEAVE_INSIDE}; training checkpoints come only {WITH_CHECKPOINTS}."
)

# What the parameters of verbs are, by name. A test holds every path of every verb against these.
CHATS = frozenset({"data", "train_data", "eval_data"})
FILES = frozenset({"adapter", "folder", "manifest"})
BASES = frozenset({"base_model", "base"})
RUNS = frozenset({"run", "output_dir"})
OTHERS = frozenset({"config", "out", "hf_token", "ssh_config"})
# Their work is on this machine wherever the model was trained.
HERE = frozenset({"cancel", "follow", "init", "install", "launch", "push", "rebuild", "runs", "serve", "uninstall"})
# They change nothing that would have to come out.
LOOKING = frozenset({"check", "chat", "doctor", "models", "plan", "status", "verify"})
# Verbs without --config whose flags are options of `Config` all the same.
_STAGES = frozenset({"compare", "train", "merge", "quantize", "modelfile", "export"})


@dataclass(frozen=True)
class Wish:
    """What the user wants of the container.

    Attributes:
        rest: the arguments without what is meant for the container.
        name: of the container.
        leave_inside, with_checkpoints: what comes out.
    """

    rest: list[str]
    name: str
    leave_inside: bool
    with_checkpoints: bool


def wish(arguments: Sequence[str], verbs: Mapping[str, frozenset[str]]) -> Wish | None:
    """What the arguments say about the container; None when they say nothing.

    The word behind ``--container`` is its name, unless it begins with a dash, is a verb that is still missing, or
    names a file or folder that is here. ``--container=NAME`` leaves no doubt.

    Args:
        arguments: the command line.
        verbs: for each verb its options that take a value: that value is never ours.
    """
    rest: list[str] = []
    name, leave_inside, with_checkpoints = "", False, False
    taking: frozenset[str] | None = None
    words = iter(enumerate(arguments))
    for at, word in words:
        following = arguments[at + 1] if at + 1 < len(arguments) else "-"
        if word == "--":
            rest += arguments[at:]
            break
        if word == FLAG:
            name = names.DEFAULT_NAME
            if (
                not following.startswith("-")
                and (taking is not None or following not in verbs)
                and not _here(following)
            ):
                name = following
                next(words)
        elif word.startswith(f"{FLAG}="):
            name = word.partition("=")[2]
        elif word in (LEAVE_INSIDE, WITH_CHECKPOINTS):
            leave_inside |= word == LEAVE_INSIDE
            with_checkpoints |= word == WITH_CHECKPOINTS
        else:
            rest.append(word)
            if taking is None and word in verbs:
                taking = verbs[word]
            elif taking is not None and word in taking and at + 1 < len(arguments):
                rest.append(following)
                next(words)
    return Wish(rest, name, leave_inside, with_checkpoints) if name else None


def _here(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def wish_of(command: Any, arguments: Sequence[str]) -> Wish | None:
    """`wish`, for the command line that `command` describes; cheap where no container is spoken of."""
    if not any(word == FLAG or word.startswith(f"{FLAG}=") for word in arguments):
        return None
    verbs = {
        name: frozenset(
            opt for each in verb.params if not getattr(each, "is_flag", True) for opt in each.opts if opt[:1] == "-"
        )
        for name, verb in command.commands.items()
    }
    return wish(arguments, verbs)


def main(command: Any, arguments: Sequence[str]) -> Any:
    """Carries a verb out, in the container when the arguments say so; returns what the verb returns."""
    wanted = wish_of(command, arguments)
    if wanted is None:
        return command.main(list(arguments), prog_name="kolotune", standalone_mode=False)
    verb = wanted.rest[0] if wanted.rest else ""
    if verb not in command.commands or verb in HERE or {"-h", "--help"} & set(wanted.rest):
        return command.main(wanted.rest, prog_name="kolotune", standalone_mode=False)
    if verb == "container":
        raise ConfigError("container: takes the name as an argument", "kolotune container start NAME")
    described = command.commands[verb]
    parent = command.make_context("kolotune", list(wanted.rest))
    context = described.make_context(verb, list(wanted.rest[1:]), parent=parent)
    # A server, and a cluster or other machines, are looked for from this machine.
    if context.params.get("ollama") or context.params.get("on"):
        return command.main(wanted.rest, prog_name="kolotune", standalone_mode=False)
    call = _Call(verb, described.params, context)
    return call.carry_out(wanted)


class _Call:
    """One verb with its arguments, understood."""

    def __init__(self, verb: str, parameters: Sequence[Any], context: Any) -> None:
        self.verb, self.parameters = verb, parameters
        self.values: dict[str, Any] = dict(context.params)
        self.given = {
            each.name
            for each in parameters
            if getattr(context.get_parameter_source(each.name), "name", "") == "COMMANDLINE"
        }
        self.names = {each.name for each in parameters}
        self.config = self._resolved()

    def _resolved(self) -> configs.Config | None:
        """The options as the verb will see them; raises what is wrong with them before anything is sent."""
        flags = {name: self.values[name] for name in self.given if name in configs.FIELDS}
        if "config" in self.names:
            data = self.values.get("data") if "data" in self.given else None
            return config_of(flags, list(data) if data else None, self.values.get("config"))
        return config_of(flags) if self.verb in _STAGES else None

    def carry_out(self, wanted: Wish) -> int:
        from kolotune.foundation.cache import cache_folder
        from kolotune.foundation.files import Hasher
        from kolotune.runners.container.docker import Docker

        say = reporter("json" in self.given)
        token = self._token()
        docker = Docker()
        volume = Volume(docker, docker.require_running(wanted.name))
        paths = PathMap(token)
        hasher = Hasher(cache_folder("container") / "hashes.json")
        sender = InputSender(volume, hasher, paths, say)
        run, out = self._run(), self._out()
        places_of_run = None
        if run is not None:
            places_of_run = (run, names.run_folder(run))
            paths.add(places_of_run[1], run)
            self._seed(volume, sender, *places_of_run)
        order = ContainerVerb(
            argv=self._argv(sender, places_of_run, out),
            paths=paths,
            run=places_of_run if self.verb not in LOOKING else None,
            out=out,
            token=token,
            as_events="json" in self.names,
            raw="json" in self.given,
            takes_input="prompt" in self.names and "prompt" not in self.given,
        )
        if out is not None:
            paths.add(out[1], out[0])
        hasher.save()
        return run_verb(volume, order, say, leave_inside=wanted.leave_inside, with_checkpoints=wanted.with_checkpoints)

    def _token(self) -> Secret:
        """The hub's token, from where the options or the environment say; an empty one for none."""
        from kolotune.base_models.hub import read_token

        source = self.config.hf_token if self.config else None
        known = [Secret(os.environ.get(name, "")) for name in HUB_TOKEN_VARIABLES]
        return read_token(source) or next(filter(None, known), Secret())

    def _run(self) -> Path | None:
        """The run folder on the host; None when the verb has none."""
        if "adapter" in self.given or "out" in self.given:
            return None
        if "output_dir" in self.names and self.config is not None:
            return Path(os.path.abspath(self.config.output_dir))
        return Path(os.path.abspath(str(self.values["run"]))) if "run" in self.names else None

    def _out(self) -> tuple[Path, PurePosixPath] | None:
        if "out" not in self.given:
            return None
        host = Path(os.path.abspath(self.values["out"]))
        if host.exists():
            raise ConfigError(f"{host}: is there already", "Name a folder that does not exist; nothing is overwritten.")
        return host, names.OUTSIDE / os.urandom(6).hex() / names.run_folder(host).name

    def _argv(
        self, sender: InputSender, run: tuple[Path, PurePosixPath] | None, out: tuple[Path, PurePosixPath] | None
    ) -> list[str]:
        options, positional = [], []
        for each in self.parameters:
            name, value = each.name, self.values.get(each.name)
            if name in RUNS and run is not None:
                value = run[1]
            elif name == "json":
                value = True
            elif name not in self.given or name == "hf_token":
                continue
            elif name == "out" and out is not None:
                value = out[1]
            elif name == "config":
                value = self._config_inside(sender, Path(str(value)))
            else:
                value = self._inside(name, value, sender)
            if each.param_type_name == "argument":
                positional += [str(one) for one in _several(value)]
            elif isinstance(value, bool):
                options.append(each.opts[0] if value else each.secondary_opts[0])
            else:
                options += [f"{each.opts[0]}={one}" for one in _several(value)]
        return [self.verb, *options, *(["--", *positional] if positional else [])]

    def _inside(self, name: str, value: Any, sender: InputSender) -> Any:
        """A parameter's value, or the place inside of the file that it names."""
        if name in CHATS:
            return [_chats_inside(Path(os.path.abspath(Path(each).expanduser())), sender) for each in _several(value)]
        if name in FILES:
            return sender.send(Path(os.path.abspath(value)))
        if name in BASES and isinstance(value, str):
            return _base_inside(configs.normalized("base_model", value, Path.cwd()), sender)
        return value

    def _config_inside(self, sender: InputSender, file: Path) -> PurePosixPath:
        import yaml

        values = _options_inside(configs.load_file(file), file.absolute().parent, sender)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return sender.send_text("kolotune.yaml", text, file)

    def _seed(self, volume: Volume, sender: InputSender, host: Path, inside: PurePosixPath) -> None:
        """Sends the run folder when it was made on the host and the container has none for it."""
        folder = RunFolder(host)
        if not folder.config.is_file() or exists(volume, inside):
            return
        import yaml

        reporter("json" in self.given).doing(f"sending {host}")
        values = _options_inside(configs.load_file(folder.config), host, sender)
        rewritten = {folder.config: yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}
        if folder.source.is_file():
            source = json.loads(folder.source.read_text(encoding="utf-8"))["source"]
            rewritten[folder.source] = json.dumps({"source": str(sender.send(Path(source)))})
        send_run(volume, folder, inside, rewritten)


def _options_inside(values: Mapping[str, Any], folder: Path, sender: InputSender) -> dict[str, Any]:
    """The options of a file with the places inside of the files that they name; the verb's own flags tell the rest."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("output_dir", "hf_token") or value is None:
            continue
        if key in CHATS:
            found[key] = [str(_chats_inside(each, sender)) for each in configs.normalized(key, value, folder)]
        elif key in BASES:
            found[key] = str(_base_inside(configs.normalized(key, value, folder), sender))
        else:
            found[key] = value
    return found


def _chats_inside(path: Path, sender: InputSender) -> PurePosixPath:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a file of chats")
    return sender.send(path)


def _base_inside(name: str, sender: InputSender) -> str | PurePosixPath:
    """A base model's folder inside; a name stays a name."""
    return sender.send(Path(name)) if Path(name).is_absolute() else name


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
