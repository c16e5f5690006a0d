"""Where jobs are done: the flags that verbs which launch have in common, and the launchers that they name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter

from . import hints
from .options import config_of, given

if TYPE_CHECKING:
    from kolotune.launching.launcher import JobSpec, Launcher, LaunchPlan

ON = ("slurm", "kubernetes", "ssh", "local")
_SENDING = ("kubernetes", "ssh")
_DAY_HOURS = 24.0
AT_ONCE = 4
# Options that only one kind of scheduler has, by their names as parameters.
_OWN: dict[str, tuple[str, ...]] = {
    "slurm": ("partition", "account", "qos", "sbatch", "keep_secrets"),
    "kubernetes": ("image", "claim", "namespace", "context", "token_secret", "gpu_kind"),
    "ssh": ("host", "remote_folder", "python", "ssh_config"),
    "local": (),
}


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def _flags(
    on: Annotated[str, typer.Option(metavar="|".join(ON), help="Where; local: here, in the background.")] = "",
    submit: Annotated[bool, typer.Option("--submit", help="Do it; without, it is only shown.")] = False,
    hours: Annotated[float, typer.Option(help="A job is stopped after so many hours.")] = _DAY_HOURS,
    gpus: Annotated[int | None, _option("GPUs of each machine.", metavar="N")] = None,
    cpus: Annotated[int | None, _option("Processor cores of each machine.", metavar="N")] = None,
    memory_gb: Annotated[float | None, _option("Memory of each machine.", metavar="GB")] = None,
    token_file: Annotated[str | None, _option("File with the hub's token, as the job sees it.")] = None,
    partition: Annotated[str | None, _option("slurm: as sbatch has it.")] = None,
    account: Annotated[str | None, _option("slurm: as sbatch has it.")] = None,
    qos: Annotated[str | None, _option("slurm: as sbatch has it.")] = None,
    sbatch: Annotated[list[str] | None, _option("slurm: one more option, as constraint=a100.")] = None,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="slurm: the job's environment has HF_TOKEN and the like, too.")
    ] = False,
    image: Annotated[str | None, _option("kubernetes: the container's image, in a registry.")] = None,
    claim: Annotated[str | None, _option("kubernetes: a volume claim, for files there and back.")] = None,
    namespace: Annotated[str | None, _option("kubernetes: as kubectl has it.")] = None,
    context: Annotated[str | None, _option("kubernetes: as kubectl has it.")] = None,
    token_secret: Annotated[
        str | None,
        _option("kubernetes: secret in the cluster with the hub's token.", metavar="NAME/KEY"),
    ] = None,
    gpu_kind: Annotated[str | None, _option("kubernetes: default nvidia.", metavar="nvidia|amd")] = None,
    host: Annotated[list[str] | None, _option("ssh: a machine, once for each; they meet at the first.")] = None,
    remote_folder: Annotated[str | None, _option("ssh: folder there; default kolotune-runs.")] = None,
    python: Annotated[str | None, _option("ssh: Python there that has kolotune; default python3.")] = None,
    ssh_config: Annotated[Path | None, _option("ssh: settings in place of your own.")] = None,
) -> None:
    """Never called: its parameters are the flags."""


_HINTS = get_type_hints(_flags, include_extras=True)
FLAGS = tuple(
    each.replace(annotation=_HINTS[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
    for each in inspect.signature(_flags).parameters.values()
)
"""For `options.with_options`; a command finds them among its ``**flags``, where `taken` takes them out."""


@dataclass(frozen=True)
class Place:
    """Where, as the flags say it.

    Attributes:
        on: the kind of scheduler.
        submit: do it.
        own: the options that only this kind has, those that were given.
        hours, gpus, cpus, memory_gb, token_file: see `launcher.JobSpec`.
    """

    on: str
    submit: bool
    own: Mapping[str, Any]
    hours: float
    gpus: int | None
    cpus: int | None
    memory_gb: float | None
    token_file: str | None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The machines that were named; none where a scheduler finds them."""
        return tuple(self.own.get("host", ()))

    def launcher(self, hosts: tuple[str, ...] | None = None) -> Launcher:
        """The launcher with the user's settings; what was not given has its own default.

        Args:
            hosts: for ssh; None: all that were named.
        """
        if self.on == "ssh":
            from kolotune.launching.ssh import Ssh

            names = {"remote_folder": "folder", "python": "python"}
            chosen = {names[name]: str(value) for name, value in self.own.items() if name in names}
            settings = str(self.own["ssh_config"].absolute()) if "ssh_config" in self.own else None
            return Ssh(self.hosts if hosts is None else hosts, ssh_config=settings, **chosen)
        if self.on == "kubernetes":
            from kolotune.launching.kubernetes import Kubernetes

            return Kubernetes(**self.own)
        from kolotune.launching.slurm import Slurm

        words = {name: self.own[name] for name in ("partition", "account", "qos") if name in self.own}
        more, keeps = tuple(self.own.get("sbatch", ())), bool(self.own.get("keep_secrets"))
        return Slurm(self.on, more=more, keeps_secrets=keeps, **words)

    def side_by_side(self, machines: int, at_once: int | None) -> list[Launcher]:
        """A launcher for each job that may be at work at the same time.

        Args:
            machines: that a job takes.
            at_once: how many; None: for ssh as many as there are machines for, otherwise `AT_ONCE`.

        Raises:
            ConfigError: there are not as many machines.
        """
        if self.on != "ssh":
            return [self.launcher()] * (at_once or AT_ONCE)
        if len(set(self.hosts)) != len(self.hosts):
            raise ConfigError("host: a machine is named twice", "A machine has one trial at a time.")
        if not self.hosts or len(self.hosts) % machines or len(self.hosts) < machines * (at_once or 1):
            raise ConfigError(
                f"host: {len(self.hosts)} machines can't be parted: each of {at_once or 'the'} trials takes {machines}",
                "Give --host for each; --nnodes says how many a trial takes, --at-once how many there are.",
            )
        groups = [self.hosts[at : at + machines] for at in range(0, len(self.hosts), machines)]
        return [self.launcher(each) for each in groups[:at_once]]

    def job_spec(self, config: Config, name: str, *, in_place: bool = False) -> JobSpec:
        """What is launched: a run with these options, under this name."""
        from kolotune.launching.job_names import require_name, require_word
        from kolotune.launching.launcher import JobSpec

        return JobSpec(
            config=config,
            name=require_name(name),
            hours=_positive("hours", self.hours),
            gpus=_positive("gpus", self.gpus),
            cpus=_positive("cpus", self.cpus),
            memory_gb=_positive("memory-gb", self.memory_gb),
            token_file=require_word("token-file", self.token_file) if self.token_file else None,
            in_place=in_place,
        )

    def with_token_of(self, config: Config, say: Reporter) -> Place:
        """This place, where a job finds the file with the hub's token that the options name."""
        if self.on in _SENDING and config.hf_token:
            say.warning("hf-token is read on this machine, and not sent: see --token-file and --token-secret")
        elif config.hf_token == "-":
            raise ConfigError("hf-token: nobody types into a job", "Give a file with --token-file.")
        elif config.hf_token:
            return dataclasses.replace(self, token_file=self.token_file or config.hf_token)
        return self


def taken_if_given(flags: dict[str, Any]) -> Place | None:
    """As `taken`; None where no flag of the place was given."""
    if all(flags[each.name] in (each.default, []) for each in FLAGS):
        for each in FLAGS:
            del flags[each.name]
        return None
    return taken(flags)


def taken(flags: dict[str, Any]) -> Place:
    """Takes the flags of the place out of a command's.

    Raises:
        ConfigError: some are missing, or don't go with each other.
    """
    mine = {each.name: flags.pop(each.name) for each in FLAGS}
    common = [each.name for each in dataclasses.fields(Place) if each.name != "own"]
    own = {name: value for name, value in mine.items() if name not in common and value not in (None, False, [])}
    on = mine["on"]
    if on not in ON:
        raise ConfigError(f"on: {on!r} is none of {', '.join(ON)}", "As --on slurm.")
    for other, options in _OWN.items():
        wrong = [f"--{name.replace('_', '-')}" for name in options if name in own and name not in _OWN[on]]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: goes with --on {other}, not with {on}")
    missing = [f"--{name}" for name in ("image", "claim") if on == "kubernetes" and name not in own]
    if missing:
        raise ConfigError(f"kubernetes: needs {' and '.join(missing)}", "docs/scaling.md says what they are.")
    return Place(own=own, **{name: mine[name] for name in common})


def resolved(
    verb: str, flags: Mapping[str, Any], data: list[Path] | None, config: Path | None, *, machines: int = 0
) -> Config:
    """The options of what is launched. Where its machines meet is for the launcher to say.

    Args:
        verb: for messages.
        flags, data, config: see `options.config_of`.
        machines: how many there are where the options don't say it; 0: one.
    """
    from kolotune.launching.launcher import LATER

    beneath = {"rdzv": LATER} | ({"nnodes": machines} if machines else {})
    found = config_of(given(flags), data, config, beneath=beneath)
    if not found.train_data:
        raise hints.no_chats(verb)
    if found.nnodes == 1 and found.rdzv == LATER:
        found = dataclasses.replace(found, rdzv=None)
    return found


def _positive(option: str, value: Any) -> Any:
    if value is not None and value <= 0:
        raise ConfigError(f"{option}: must be greater than 0, not {value}")
    return value


def show_plan(plan: LaunchPlan, say: Reporter) -> None:
    """Shows what would be done."""
    for step in plan.steps:
        say.result(step)
    for name, text in plan.files:
        say.result(f"\n--- {name}\n{text}")
    say.note("nothing was done; with --submit it is")
