"""`kolotune plan`: what a run would do and need, found out without leaving anything behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.base_models.new_tokens import resolve_base
from kolotune.engines.engine import CalibrationGap, get_engine
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.planning import duration, export_sizes, fit, network
from kolotune.planning.duration import MeasuredSteps
from kolotune.planning.gaps import Gap, GapKind
from kolotune.planning.memory import MAIN_PROCESS
from kolotune.planning.needs import Needs, estimate_needs
from kolotune.planning.network import Traffic
from kolotune.planning.workload import Workload, read_workload
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context, Stage
from kolotune.stages import compare, prepare, train
from kolotune.weights.model_shape import DTYPE_BYTES, AdapterShape, read_shape

from .choices import choose, choose_experts, follow_start
from .selection import select_stages
from .stages import STAGE_NAMES


@dataclass
class RunPlan:
    """What a run would do and need.

    Attributes:
        config: the options, with those that are chosen automatically.
        stages: names of the stages that have work.
        facts: about the prepared chats, as in the record of prepare.
        workload: what is trained on.
        needs: memory and disk space.
        seconds: of each stage; empty if nothing was measured.
        measured: the steps that were tried.
        converts: whether llama.cpp can convert the model; None if it was not asked.
        problems: why the run would fail.
        gaps: what is not known.
        traffic: between machines, if several train.
    """

    config: Config
    stages: list[str]
    facts: JsonObject
    workload: Workload
    needs: Needs
    seconds: dict[str, float] = field(default_factory=dict)
    measured: MeasuredSteps | None = None
    converts: bool | None = None
    problems: list[KolotuneError] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    traffic: Traffic | None = None


def plan_run(config: Config, reporter: Reporter, *, measure: bool, link: float | None = None) -> RunPlan:
    """Plan the run of `config`. The run folder is read and not changed.

    Args:
        config: the resolved options.
        reporter: shows what is being done.
        measure: whether to train some steps, to know the time.
        link: megabits per second of the network between machines; None if not known.

    Raises:
        KolotuneError: the chats or the base model can't be used at all. What would only make the run fail is listed in
            `RunPlan.problems`.
    """
    started = _process_age()
    target = RunFolder(config.output_dir)
    config, choices = choose(config, target)
    base = resolve_base(config, reporter)
    real, _ = choose_experts(follow_start(Context(config, target, base)), choices, reporter)
    config = real.config
    busy = select_stages(STAGE_NAMES, real).pending
    names = [stage.NAME for stage in busy]
    with _temporary_run(real) as trial:
        facts, prepare_seconds = _prepare_chats(real, trial, reporter, prepare in busy)
        workload = read_workload(trial.run.prepared, config, trial.run.log("plan"))
        problems, converts = _run_preflights(busy, trial, reporter)
        if converts is False:
            names = [name for name in names if name in ("prepare", "train", "merge")]
        log = trial.run.log("plan")
        needs = estimate_needs(real, names, log, workload)
        plan = RunPlan(config, names, facts, workload, needs, converts=converts, gaps=list(needs.gaps))
        shortages = fit.find_shortages(needs, real, workload, names, log)
        plan.problems = [*problems, *(shortage.as_error() for shortage in shortages)]
        if measure and not plan.problems and train in busy:
            _measure(plan, trial, reporter, {"start": started, "prepare": prepare_seconds})
        if config.nnodes > 1 and train in busy:
            plan.traffic = _estimate_traffic(plan, trial, link)
        if compare.NAME in names:
            plan.gaps.append(Gap(GapKind.COMPARISON))
    return plan


def _process_age() -> float:
    """Return the seconds since this process started, which every run spends too."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())


@contextmanager
def _temporary_run(real: Context) -> Iterator[Context]:
    """Yield the same run in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="kolotune-plan-") as folder:
        run = RunFolder(Path(folder))
        run.state.mkdir()
        yield Context(real.config, run, real.base, None, real.hasher)


def _prepare_chats(real: Context, trial: Context, reporter: Reporter, has_work: bool) -> tuple[JsonObject, float]:
    """Put the prepared chats into the trial's folder; return their facts and the seconds that preparing took.

    Chats that the real run folder already has are copied from there.
    """
    record = None if has_work else read_record(real.run, prepare.NAME)
    if record is not None and real.run.prepared.is_dir():
        shutil.copytree(real.run.prepared, trial.run.prepared)
        return record.facts, 0.0
    reporter.doing(prepare.DOING)
    started = time.perf_counter()
    prepare.preflight(trial, reporter)
    return prepare.run(trial, reporter), time.perf_counter() - started


def _run_preflights(
    busy: Sequence[Stage], trial: Context, reporter: Reporter
) -> tuple[list[KolotuneError], bool | None]:
    """Return why stages that have work would fail, and whether the model can be converted (None: not asked)."""
    problems: list[KolotuneError] = []
    converts: bool | None = None
    for stage in busy:
        if stage is prepare:
            continue
        exports = stage.NAME in ("convert", "quantize")
        try:
            if stage is train:
                train.check(trial)  # a plan does not install the engine's environment
            else:
                stage.preflight(trial, reporter)
            if exports:
                converts = converts is not False
        except KolotuneError as error:
            problems.append(error)
            if exports:
                converts = False
    return problems, converts


def _measure(plan: RunPlan, trial: Context, reporter: Reporter, known_seconds: dict[str, float]) -> None:
    """Add the time of each stage, and the training memory if no formula gives it."""
    match get_engine(plan.config.engine).calibration_gap(plan.config, trial.base):
        case CalibrationGap.UNSUPPORTED:
            plan.gaps.append(Gap(GapKind.TIME_OF_ENGINE, plan.config.engine))
            return
        case CalibrationGap.SHARDED:
            plan.gaps.append(Gap(GapKind.TIME_WHEN_SHARDED))
            return
    reporter.doing("trying some training steps, to estimate the time (--no-measure skips this)")
    steps = duration.measure_steps(trial)
    rates = duration.measure_rates(trial)
    sizes = export_sizes.measure_exports(trial, trial.run.log("plan"))
    plan.measured = steps
    stages = duration.stage_seconds(trial, plan.workload, sizes, plan.needs.disk, steps, rates)
    plan.seconds = {**known_seconds, **stages}
    if steps.calibration.device == "cpu" and plan.needs.memory.get("train") is None:
        plan.needs.memory["train"] = MAIN_PROCESS + steps.calibration.process_memory
        plan.gaps = [gap for gap in plan.gaps if not gap.is_training_memory]


def _estimate_traffic(plan: RunPlan, trial: Context, link: float | None) -> Traffic:
    """Return what the machines send each other, and for how long; the training's time grows by that."""
    config, workload = plan.config, plan.workload
    shape, processes = read_shape(trial.base), config.nproc * config.nnodes
    weights = AdapterShape.of_options(shape, config).weight_count
    gradients, base = network.gradient_bytes(weights, processes), 0
    engine = get_engine(config.engine)
    is_sharded = engine.is_sharded(config, trial.base)
    if is_sharded and not engine.knows_shard_traffic:
        plan.gaps.append(Gap(GapKind.TRAFFIC_WHEN_SHARDED, engine.name))
    elif is_sharded:
        # A chat's sequences are computed one by one.
        batches = -(-config.gradient_accumulation * workload.sequences // (processes * max(1, workload.chats)))
        layers = shape.layer_weight_count * DTYPE_BYTES[config.dtype]
        base = network.sharded_base_bytes(layers, processes, batches)
    if link is None:
        plan.gaps.append(Gap(GapKind.NETWORK_TIME))
        return Traffic(gradients + base, base=base)
    seconds, computing = network.transfer_seconds(gradients + base, link), None
    if plan.measured is not None:
        tokens = workload.tokens / max(1, workload.steps_in_epoch)
        per_token = plan.measured.calibration.per_token
        computing = tokens * per_token / config.nnodes
        plan.seconds["train"] += workload.steps * (seconds + computing - tokens * per_token)
    return Traffic(gradients + base, seconds, computing, config.gradient_accumulation, base)
