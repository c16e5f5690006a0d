"""`kolotune plan`: what a run would do and take, found out without leaving anything behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.base_models import catalog
from kolotune.engines import estimates
from kolotune.engines.estimates import Adapter, read_shape
from kolotune.engines.torchtune import architecture
from kolotune.engines.torchtune import plan as torchtune
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.files import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.planning import duration, fit, network
from kolotune.planning.duration import Measured
from kolotune.planning.fit import Needs, Work
from kolotune.planning.network import Traffic
from kolotune.run_folder import records
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import Context, Stage
from kolotune.stages import compare, prepare, train

from . import run as pipeline


@dataclass
class Plan:
    """What a run would do and take.

    Attributes:
        config: with what is chosen automatically.
        stages: names of the stages that have work.
        facts: of the prepared chats, as in the record of prepare.
        work: what is trained on.
        needs: memory and disk.
        seconds: of each stage; empty when nothing was measured.
        converts: whether llama.cpp can convert the model; None: it was not asked.
        problems: why the run would fail.
        unknown: what is not known, in sentences.
        traffic: between machines, where several train.
    """

    config: Config
    stages: list[str]
    facts: dict[str, Any]
    work: Work
    needs: Needs
    seconds: dict[str, float] = field(default_factory=dict)
    measured: Measured | None = None
    converts: bool | None = None
    problems: list[KolotuneError] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    traffic: Traffic | None = None


def make(config: Config, reporter: Reporter, *, measure: bool, link: float | None = None) -> Plan:
    """Plans the run of `config`; the run folder is looked at, and not touched.

    Args:
        config: the resolved options.
        reporter: told what is being done.
        measure: do some steps, to know the time.
        link: megabits a second of the network between machines; None: it is not known.

    Raises:
        KolotuneError: the chats or the base can't be used at all. What only makes the run fail is in `Plan.problems`.
    """
    started = _age()
    target = RunFolder(config.output_dir)
    config, _ = pipeline.with_choices(config, target)
    base = catalog.resolve(config.base_model, config.hf_token, reporter)
    hasher = Hasher()
    there = Context(config, target, base, None, hasher)
    stages = [stage for stage in pipeline.STAGES if stage.NAME not in pipeline.not_had(config)]
    busy = list(pipeline.to_do(stages, there, hasher))
    names = [stage.NAME for stage in busy]
    with _room(there) as room:
        facts, prepared_in = _prepared(there, room, reporter, prepare in busy)
        work = fit.work_of(room.run.prepared, config)
        problems, converts = _asked(busy, room, reporter)
        if converts is False:
            names = [name for name in names if name in ("prepare", "train", "merge")]
        log = room.run.log("plan")
        needs = fit.needs(there, names, log, work)
        plan = Plan(config, names, facts, work, needs, converts=converts, unknown=list(needs.unknown))
        plan.problems = [*problems, *fit.problems(needs, there, work, names, log)]
        if measure and not plan.problems and train in busy:
            _measure(plan, room, reporter, {"start": started, "prepare": prepared_in})
        if config.nnodes > 1 and train in busy:
            plan.traffic = _traffic(plan, room, link)
        if compare.NAME in names:
            plan.unknown.append("memory and time of the comparison at the end (--no-compare leaves it out)")
    return plan


def _age() -> float:
    """Seconds since this process began: what starting takes."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())


@contextmanager
def _room(there: Context) -> Iterator[Context]:
    """The same run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="kolotune-plan-") as folder:
        run = RunFolder(Path(folder))
        run.state.mkdir()
        yield Context(there.config, run, there.base, None, there.hasher)


def _prepared(there: Context, room: Context, reporter: Reporter, has_work: bool) -> tuple[dict[str, Any], float]:
    """The facts of the prepared chats, and the seconds it took; what the run folder has is taken from there."""
    record = None if has_work else records.read(there.run, prepare.NAME)
    if record is not None and there.run.prepared.is_dir():
        shutil.copytree(there.run.prepared, room.run.prepared)
        return record.facts, 0.0
    reporter.doing(prepare.DOING)
    started = time.perf_counter()
    prepare.preflight(room, reporter)
    return prepare.run(room, reporter), time.perf_counter() - started


def _asked(busy: list[Stage], room: Context, reporter: Reporter) -> tuple[list[KolotuneError], bool | None]:
    """What the stages that have work say before they start: why they would fail, and whether conversion works."""
    found: list[KolotuneError] = []
    converts: bool | None = None
    for stage in busy:
        if stage is prepare:
            continue
        try:
            if stage is train and room.config.engine == "torchtune":
                torchtune.check(room.config, architecture.read(room.base))  # its environment is not made for a plan
            else:
                stage.preflight(room, reporter)
            if stage.NAME in ("convert", "quantize"):
                converts = converts is not False
        except KolotuneError as error:
            found.append(error)
            if stage.NAME in ("convert", "quantize"):
                converts = False
    return found, converts


def _measure(plan: Plan, room: Context, reporter: Reporter, known: dict[str, float]) -> None:
    """Adds the time, and the memory where no formula gives it."""
    if plan.config.engine != "native":
        plan.unknown.append(f"time: {plan.config.engine} is not measured")
        return
    if train.is_sharded(plan.config, room.base):
        plan.unknown.append("time: one process alone can't try a base that is parted over several (--sharding)")
        return
    reporter.doing("some steps of the training, to know how long it takes (--no-measure leaves them out)")
    steps = duration.measure_steps(room)
    rates = duration.measure_rates(room)
    sizes = fit.exported(room, room.run.log("plan"))
    plan.measured = steps
    plan.seconds = {**known, **duration.seconds(room, plan.work, sizes, plan.needs.disk, steps, rates)}
    if steps.device == "cpu" and plan.needs.memory.get("train") is None:  # no formula: as it was
        plan.needs.memory["train"] = fit.with_main(steps.memory)
        plan.unknown = [each for each in plan.unknown if not each.startswith("memory at train")]


def _traffic(plan: Plan, room: Context, link: float | None) -> Traffic:
    """What the machines send each other, and how long that takes where the network's speed is known."""
    config, work = plan.config, plan.work
    shape, processes = read_shape(room.base), config.nproc * config.nnodes
    weights = Adapter.of(shape, config.lora_rank, config.target_modules).weights
    sent, base = network.of_step(weights, processes), 0
    if config.engine == "torchtune":
        plan.unknown.append("what the base that torchtune parts over the machines sends in a step")
    elif train.is_sharded(config, room.base):
        batches = -(-config.gradient_accumulation // processes)
        layers = shape.in_layers * estimates.WIDTHS[config.dtype]
        base = network.of_parted_base(layers, processes, batches)
    if link is None:
        plan.unknown.append("time of the network between the machines: --link-mbit says how fast it is")
        return Traffic(sent + base, base=base)
    taken, computing = network.seconds(sent + base, link), None
    if plan.measured is not None:
        tokens = work.tokens / max(1, work.steps_in_epoch)
        computing = tokens * plan.measured.per_token / config.nnodes
        plan.seconds["train"] += work.steps * (taken + computing - tokens * plan.measured.per_token)
    return Traffic(sent + base, taken, computing, config.gradient_accumulation, base)
