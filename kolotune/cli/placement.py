"""Where jobs run: the flags that launching verbs share, and the launchers that they name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_type_hints

import typer

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter

from . import hints
from .options import drop_unset, resolve_flags
from .parameters import FileRole

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from kolotune.launching.launcher import JobSpec, Launcher, LaunchPlan

N = TypeVar("N", int, float)

LAUNCHERS = ("slurm", "kubernetes", "ssh", "local")
AT_ONCE = 4
_SENDING = ("kubernetes", "ssh")
_DAY_HOURS = 24.0


def _option(text: str, *names: str, metavar: str | None = None) -> OptionInfo:
    option: OptionInfo = typer.Option(*names, help=text, metavar=metavar, show_default=False)
    return option


# These functions are never called: their parameters are the flags.
def _common_flags(
    on: Annotated[
        str, typer.Option(metavar="|".join(LAUNCHERS), help="Where to run; local: here, in the background.")
    ] = "",
    submit: Annotated[bool, typer.Option("--submit", help="Launch it; otherwise only show what it does.")] = False,
    hours: Annotated[float, typer.Option(help="Stop a job after this many hours.")] = _DAY_HOURS,
    gpus: Annotated[int | None, _option("GPUs of each machine.", metavar="N")] = None,
    cpus: Annotated[int | None, _option("Processor cores of each machine.", metavar="N")] = None,
    memory_gb: Annotated[float | None, _option("Memory of each machine.", metavar="GB")] = None,
    token_file: Annotated[str | None, _option("File with the hub token, as the job sees it.")] = None,
) -> None:
    """Flags for every launcher."""


def _slurm_flags(
    partition: Annotated[str | None, _option("slurm: as for sbatch.")] = None,
    account: Annotated[str | None, _option("slurm: as for sbatch.")] = None,
    qos: Annotated[str | None, _option("slurm: as for sbatch.")] = None,
    sbatch: Annotated[
        list[str] | None, _option("slurm: another option of sbatch, as constraint=a100; may be repeated.")
    ] = None,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="slurm: pass HF_TOKEN and similar variables to the job.")
    ] = False,
) -> None:
    """Flags for slurm only."""


def _kubernetes_flags(
    image: Annotated[str | None, _option("kubernetes: the container image, in a registry.")] = None,
    claim: Annotated[str | None, _option("kubernetes: the volume claim that files travel through.")] = None,
    namespace: Annotated[str | None, _option("kubernetes: as for kubectl.")] = None,
    context: Annotated[str | None, _option("kubernetes: as for kubectl.")] = None,
    token_secret: Annotated[
        str | None, _option("kubernetes: the secret in the cluster with the hub token.", metavar="NAME/KEY")
    ] = None,
    gpu_kind: Annotated[str | None, _option("kubernetes: default nvidia.", metavar="nvidia|amd")] = None,
) -> None:
    """Flags for kubernetes only."""


def _ssh_flags(
    host: Annotated[list[str] | None, _option("ssh: a machine; repeat for each. They meet at the first one.")] = None,
    remote_folder: Annotated[str | None, _option("ssh: folder there; default kolotune-runs.")] = None,
    python: Annotated[str | None, _option("ssh: a Python there that has kolotune; default python3.")] = None,
    ssh_config: Annotated[
        Path | None, _option("ssh: a configuration file instead of your own."), FileRole.NOT_SENT
    ] = None,
) -> None:
    """Flags for ssh only."""


def _flags_of(function: Callable[..., None]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [
        each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(function).parameters.values()
    ]


_OWN_FLAGS = {
    "slurm": _flags_of(_slurm_flags), "kubernetes": _flags_of(_kubernetes_flags), "ssh": _flags_of(_ssh_flags)
}  # fmt: skip
FLAGS = (*_flags_of(_common_flags), *(flag for flags in _OWN_FLAGS.values() for flag in flags))
"""For `options.with_options`; a verb gets them among its ``**flags``, and `take_placement` removes them."""
_LAUNCHER_OF = {flag.name: launcher for launcher, flags in _OWN_FLAGS.items() for flag in flags}


@dataclass(frozen=True)
class Placement:
    """Where jobs run, as the flags say.

    Attributes:
        on: the kind of launcher.
        submit: launch it.
        own: the given options that only this kind has.
        hours, gpus, cpus, memory_gb, token_file: see `launcher.JobSpec`.
    """

    on: str
    submit: bool
    own: Mapping[str, object]
    hours: float
    gpus: int | None
    cpus: int | None
    memory_gb: float | None
    token_file: str | None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The named machines; none where a scheduler finds them."""
        return self._texts("host")

    def launcher(self, hosts: tuple[str, ...] | None = None) -> Launcher:
        """Return the launcher with the user's settings.

        Args:
            hosts: for ssh; None: all named machines.
        """
        if self.on == "ssh":
            from kolotune.launching.ssh import Ssh

            names = {"remote_folder": "folder", "python": "python"}
            settings = {new: str(self.own[name]) for name, new in names.items() if name in self.own}
            ssh_config = str(Path(str(self.own["ssh_config"])).absolute()) if "ssh_config" in self.own else None
            return Ssh(self.hosts if hosts is None else hosts, ssh_config=ssh_config, **settings)
        if self.on == "kubernetes":
            from kolotune.launching.kubernetes import Kubernetes

            return Kubernetes(**{name: str(value) for name, value in self.own.items()})
        from kolotune.launching.slurm import Slurm

        words = {name: str(self.own[name]) for name in ("partition", "account", "qos") if name in self.own}
        return Slurm(self.on, more=self._texts("sbatch"), keeps_secrets="keep_secrets" in self.own, **words)

    def launchers(self, machines: int, at_once: int | None) -> list[Launcher]:
        """Return a launcher for each job that may run at the same time.

        Args:
            machines: how many a job needs.
            at_once: how many jobs; None: for ssh the number that the machines allow, otherwise `AT_ONCE`.

        Raises:
            ConfigError: there are not enough machines.
        """
        if self.on != "ssh":
            return [self.launcher()] * (at_once or AT_ONCE)
        if len(set(self.hosts)) != len(self.hosts):
            raise ConfigError("host: a machine is named twice", "A machine runs one trial at a time.")
        if not self.hosts or len(self.hosts) % machines or len(self.hosts) < machines * (at_once or 1):
            raise ConfigError(
                f"host: {len(self.hosts)} machines cannot be divided among {at_once or 'the'} trials that need "
                f"{machines} each",
                "Give --host for each machine; --nnodes says how many a trial needs, --at-once how many trials run.",
            )
        groups = [self.hosts[start : start + machines] for start in range(0, len(self.hosts), machines)]
        return [self.launcher(group) for group in groups[:at_once]]

    def job_spec(self, config: Config, name: str, *, in_place: bool = False) -> JobSpec:
        """Return what to launch: a run with these options, under this name."""
        from kolotune.launching.job_names import require_name, require_word
        from kolotune.launching.launcher import JobSpec

        return JobSpec(
            config=config,
            name=require_name(name),
            hours=_require_positive("hours", self.hours),
            gpus=_positive_or_none("gpus", self.gpus),
            cpus=_positive_or_none("cpus", self.cpus),
            memory_gb=_positive_or_none("memory-gb", self.memory_gb),
            token_file=require_word("token-file", self.token_file) if self.token_file else None,
            in_place=in_place,
        )

    def with_token_of(self, config: Config, say: Reporter) -> Placement:
        """Return this placement with the token file that the options name, if jobs can read it."""
        if self.on in _SENDING and config.hf_token:
            say.warning("hf-token is read on this machine and not sent: see --token-file and --token-secret")
        elif config.hf_token == "-":
            raise ConfigError("hf-token: a job has no standard input", "Give a file with --token-file.")
        elif config.hf_token:
            return dataclasses.replace(self, token_file=self.token_file or config.hf_token)
        return self

    def _texts(self, name: str) -> tuple[str, ...]:
        value = self.own.get(name, ())
        return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def take_placement_if_given(flags: dict[str, object]) -> Placement | None:
    """Remove the flags of the placement from a verb's; return None if none was given."""
    if all(flags[each.name] in (each.default, []) for each in FLAGS):
        for each in FLAGS:
            del flags[each.name]
        return None
    return take_placement(flags)


def take_placement(flags: dict[str, object]) -> Placement:
    """Remove the flags of the placement from a verb's, and return it.

    Raises:
        ConfigError: some are missing or cannot be combined.
    """
    values = {each.name: flags.pop(each.name) for each in FLAGS}
    on = str(values["on"])
    if on not in LAUNCHERS:
        raise ConfigError(f"on: {on!r} is not one of {', '.join(LAUNCHERS)}", "For example --on slurm.")
    own = {name: values.pop(name) for name in _LAUNCHER_OF}
    own = {name: value for name, value in own.items() if value not in (None, False, [])}
    for launcher in LAUNCHERS:
        wrong = [f"--{name.replace('_', '-')}" for name in own if _LAUNCHER_OF[name] == launcher != on]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: only for --on {launcher}, not for {on}")
    missing = [f"--{name}" for name in ("image", "claim") if on == "kubernetes" and name not in own]
    if missing:
        raise ConfigError(f"kubernetes: needs {' and '.join(missing)}", "docs/scaling.md explains them.")
    return Placement(own=own, **values)  # type: ignore[arg-type]  # typer has checked the types


def resolve_for_launch(
    verb: str, flags: Mapping[str, object], data: Sequence[Path] | None, config: Path | None, *, machines: int = 0
) -> Config:
    """Resolve the options of what is launched. The launcher decides where its machines meet.

    Args:
        verb: for messages.
        flags, data, config: see `options.resolve_flags`.
        machines: how many there are if the options don't say it; 0: one.
    """
    from kolotune.launching.launcher import LATER

    defaults: dict[str, object] = {"rdzv": LATER} | ({"nnodes": machines} if machines else {})
    resolved = resolve_flags(drop_unset(flags), data, config, defaults=defaults)
    if not resolved.train_data:
        raise hints.no_chats(verb)
    if resolved.nnodes == 1 and resolved.rdzv == LATER:
        resolved = dataclasses.replace(resolved, rdzv=None)
    return resolved


def _positive_or_none(option: str, value: N | None) -> N | None:
    return None if value is None else _require_positive(option, value)


def _require_positive(option: str, value: N) -> N:
    if value <= 0:
        raise ConfigError(f"{option}: must be greater than 0, not {value}")
    return value


def show_plan(plan: LaunchPlan, say: Reporter) -> None:
    """Show what would be done."""
    for step in plan.steps:
        say.result(step)
    for name, text in plan.files:
        say.result(f"\n--- {name}\n{text}")
    say.note("Nothing was done; add --submit to launch it.")
