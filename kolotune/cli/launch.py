"""The verbs of clusters and other machines: launch, follow, cancel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..config import DEFAULT_OUTPUT_DIR, Config
from ..errors import ConfigError
from ..layout import RunFolder
from ..reporter import Reporter
from . import hints
from .options import ConfigFile, Data, Json, config_of, given, reporter, show, with_options

if TYPE_CHECKING:
    from ..launching.contract import Launched, Launcher, Order, Plan

_ON = ("slurm", "kubernetes", "ssh", "local")
_DAY_HOURS = 24.0
# Options that only one kind of scheduler has, by their names as parameters.
_OWN: dict[str, tuple[str, ...]] = {
    "slurm": ("partition", "account", "qos", "sbatch", "keep_secrets"),
    "kubernetes": ("image", "claim", "namespace", "context", "token_secret", "gpu_kind"),
    "ssh": ("host", "remote_folder", "python", "ssh_config"),
    "local": (),
}
_SENDING = ("kubernetes", "ssh")

Run = Annotated[Path, typer.Argument(help="The run folder that the job was launched from.")]


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (launch, follow, cancel):
        app.command()(verb)


@with_options("data", "model", "training", "machines", "export", "comparison", leave_out=("hf_token",))
def launch(
    data: Data = None,
    config: ConfigFile = None,
    on: Annotated[str, typer.Option(metavar="|".join(_ON), help="Where; local: here, in the background.")] = "",
    submit: Annotated[bool, typer.Option("--submit", help="Do it; without, it is only shown.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Don't wait: `kolotune follow` goes on from there.")] = False,
    name: Annotated[Optional[str], _option("The job's name; default: one that belongs to the run folder.")] = None,  # noqa: UP045
    hours: Annotated[float, typer.Option(help="The job is stopped after so many hours.")] = _DAY_HOURS,
    gpus: Annotated[Optional[int], _option("GPUs of each machine.", metavar="N")] = None,  # noqa: UP045
    cpus: Annotated[Optional[int], _option("Processor cores of each machine.", metavar="N")] = None,  # noqa: UP045
    memory_gb: Annotated[Optional[float], _option("Memory of each machine.", metavar="GB")] = None,  # noqa: UP045
    token_file: Annotated[Optional[str], _option("File with the hub's token, as the job sees it.")] = None,  # noqa: UP045
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Chats and base model are named as they are there; send nothing but options."),
    ] = False,
    partition: Annotated[Optional[str], _option("slurm: as sbatch has it.")] = None,  # noqa: UP045
    account: Annotated[Optional[str], _option("slurm: as sbatch has it.")] = None,  # noqa: UP045
    qos: Annotated[Optional[str], _option("slurm: as sbatch has it.")] = None,  # noqa: UP045
    sbatch: Annotated[Optional[list[str]], _option("slurm: one more option, as constraint=a100.")] = None,  # noqa: UP045
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="slurm: the job's environment has HF_TOKEN and the like, too.")
    ] = False,
    image: Annotated[Optional[str], _option("kubernetes: the container's image, in a registry.")] = None,  # noqa: UP045
    claim: Annotated[Optional[str], _option("kubernetes: a volume claim, for files there and back.")] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], _option("kubernetes: as kubectl has it.")] = None,  # noqa: UP045
    context: Annotated[Optional[str], _option("kubernetes: as kubectl has it.")] = None,  # noqa: UP045
    token_secret: Annotated[
        Optional[str],  # noqa: UP045
        _option("kubernetes: secret in the cluster with the hub's token.", metavar="NAME/KEY"),
    ] = None,
    gpu_kind: Annotated[Optional[str], _option("kubernetes: default nvidia.", metavar="nvidia|amd")] = None,  # noqa: UP045
    host: Annotated[Optional[list[str]], _option("ssh: a machine, once for each; they meet at the first.")] = None,  # noqa: UP045
    remote_folder: Annotated[Optional[str], _option("ssh: folder there; default kolotune-runs.")] = None,  # noqa: UP045
    python: Annotated[Optional[str], _option("ssh: Python there that has kolotune; default python3.")] = None,  # noqa: UP045
    ssh_config: Annotated[Optional[Path], _option("ssh: settings in place of your own.")] = None,  # noqa: UP045
    json: Json = False,
    **flags: Any,
) -> int:
    """A run on a cluster or other machines. Shows exactly what it would do; with --submit, does it."""
    from ..launching.contract import Order, name_for, require_name, require_word

    say = reporter(json)
    own = {
        "partition": partition, "account": account, "qos": qos, "sbatch": sbatch, "keep_secrets": keep_secrets,
        "image": image, "claim": claim, "namespace": namespace, "context": context, "token_secret": token_secret,
        "gpu_kind": gpu_kind, "host": host, "remote_folder": remote_folder, "python": python, "ssh_config": ssh_config,
    }  # fmt: skip
    own = {option: value for option, value in own.items() if value not in (None, False, [])}
    _require_fitting(on, own)
    launcher = _launcher(on, own)
    resolved = _resolved(flags, data, config, len(host or ()))
    if on in _SENDING and resolved.hf_token:
        say.warning("hf-token is read on this machine, and not sent: see --token-file and --token-secret")
    elif resolved.hf_token == "-":
        raise ConfigError("hf-token: nobody types into a job", "Give a file with --token-file.")
    elif resolved.hf_token:
        token_file = token_file or resolved.hf_token
    if not in_place:
        hints.require_files((*resolved.train_data, *resolved.eval_data))
    order = Order(
        config=resolved,
        name=require_name(name or name_for(resolved.output_dir)),
        hours=_positive("hours", hours),
        gpus=_positive("gpus", gpus),
        cpus=_positive("cpus", cpus),
        memory_gb=_positive("memory-gb", memory_gb),
        token_file=require_word("token-file", token_file) if token_file else None,
        in_place=in_place,
    )
    if not submit:
        show(resolved, say)
        _show_plan(launcher.plan(order), say)
        say.note("nothing was done; with --submit it is")
        return 0
    return _submit(launcher, order, say, detach)


def follow(
    run: Run = DEFAULT_OUTPUT_DIR,
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="Bring the results here at the end.")] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the end, and tell what the job tells.")
    ] = True,
    json: Json = False,
) -> int:
    """What a launched job tells, until it ends; then its results are fetched."""
    say = reporter(json)
    folder = RunFolder(run.absolute())
    launcher, launched = _again(folder)
    return _follow(launcher, launched, folder, say, wait=wait, fetch=fetch)


def cancel(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False) -> int:
    """Stops a launched job."""
    say = reporter(json)
    launcher, launched = _again(RunFolder(run.absolute()))
    launcher.cancel(launched, say)
    say.success(f"stopped: job {launched.job}")
    return 0


def _require_fitting(on: str, own: dict[str, Any]) -> None:
    if on not in _ON:
        raise ConfigError(f"on: {on!r} is none of {', '.join(_ON)}", "As --on slurm.")
    for other, options in _OWN.items():
        wrong = [f"--{name.replace('_', '-')}" for name in options if name in own and name not in _OWN[on]]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: goes with --on {other}, not with {on}")
    missing = [f"--{name}" for name in ("image", "claim") if on == "kubernetes" and name not in own]
    if missing:
        raise ConfigError(f"kubernetes: needs {' and '.join(missing)}", "docs/scaling.md says what they are.")


def _launcher(on: str, own: dict[str, Any]) -> Launcher:
    """The launcher with the user's settings; what was not given has its own default."""
    if on == "ssh":
        from ..launching.ssh import Ssh

        names = {"remote_folder": "folder", "python": "python"}
        chosen = {names[name]: str(value) for name, value in own.items() if name in names}
        settings = str(own["ssh_config"].absolute()) if "ssh_config" in own else None
        return Ssh(tuple(own.get("host", ())), ssh_config=settings, **chosen)
    if on == "kubernetes":
        from ..launching.kubernetes import Kubernetes

        return Kubernetes(**own)
    from ..launching.slurm import Slurm

    words = {name: own[name] for name in ("partition", "account", "qos") if name in own}
    more, keeps = tuple(own.get("sbatch", ())), bool(own.get("keep_secrets"))
    return Slurm(on, more=more, keeps_secrets=keeps, **words)


def _again(folder: RunFolder) -> tuple[Launcher, Launched]:
    """The job that was launched from a folder, and its launcher."""
    from ..launching.contract import Launched
    from ..launching.kubernetes import Kubernetes
    from ..launching.slurm import Slurm
    from ..launching.ssh import Ssh

    launched = Launched.read(folder)
    kind: Any = {"ssh": Ssh, "kubernetes": Kubernetes}.get(launched.on, Slurm)
    lists = {name: tuple(value) for name, value in launched.options.items() if isinstance(value, list)}
    return kind(**(launched.options | lists)), launched


def _resolved(flags: dict[str, Any], data: list[Path] | None, config: Path | None, hosts: int) -> Config:
    """The run's options. Where its machines meet is for the launcher to say."""
    from ..launching.contract import LATER

    beneath = {"rdzv": LATER} | ({"nnodes": hosts} if hosts else {})
    resolved = config_of(given(flags), data, config, beneath=beneath)
    if not resolved.train_data:
        raise hints.no_chats("launch")
    if resolved.nnodes == 1 and resolved.rdzv == LATER:
        resolved = dataclasses.replace(resolved, rdzv=None)
    return resolved


def _positive(option: str, value: Any) -> Any:
    if value is not None and value <= 0:
        raise ConfigError(f"{option}: must be greater than 0, not {value}")
    return value


def _show_plan(plan: Plan, say: Reporter) -> None:
    for step in plan.steps:
        say.result(step)
    for name, text in plan.files:
        say.result(f"\n--- {name}\n{text}")


def _submit(launcher: Launcher, order: Order, say: Reporter, detach: bool) -> int:
    folder = RunFolder(order.config.output_dir)
    launched = launcher.submit(order, say)
    launched.write(folder)
    if detach:
        say.note(f"what it tells, and its results: kolotune follow {folder.root}")
        return 0
    say.note(f"Ctrl-C leaves it at work; later: kolotune follow {folder.root}, or kolotune cancel {folder.root}")
    return _follow(launcher, launched, folder, say, wait=True, fetch=True)


def _follow(
    launcher: Launcher, launched: Launched, folder: RunFolder, say: Reporter, *, wait: bool, fetch: bool
) -> int:
    code = launcher.follow(launched, say) if wait else 0
    if fetch:
        came = [name for name in launcher.fetch(launched, folder, say) if not name.startswith(".")]
        if came:
            say.note(f"fetched to {folder.root}: {', '.join(came)}")
    return code
