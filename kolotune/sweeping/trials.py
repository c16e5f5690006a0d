"""The trials of a sweep, each a run folder of its own over the same prepared chats; `run` has one after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

from kolotune.foundation.config import Config
from kolotune.foundation.errors import DataError, TrainingError
from kolotune.foundation.reporter import Reporter
from kolotune.pipeline.choices import choose
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder import metrics
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import kept_held_out_loss, read_metrics
from kolotune.run_folder.records import read_record
from kolotune.stages import prepare, train

from .record import Record, Trial, read
from .search import next_values
from .space import Varied, with_values

_CHATS = "chats"  # the run folder that only prepares


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep whose chats are prepared.

    Attributes:
        record: its trials so far.
        shared: the options that all trials share; `output_dir` is the sweep's folder.
        chats: the run folder that has the prepared chats.
        trials: how many there shall be, at most.
    """

    record: Record
    shared: Config
    chats: RunFolder
    trials: int

    def next(self) -> Trial | None:
        """A new trial; None when all were had. It is in the record from now on: a sweep that goes on has the same."""
        values = next_values(self.record, self.trials, self.shared.seed)
        if values is None:
            return None
        trial = Trial(len(self.record.trials) + 1, values)
        self.record.trials.append(trial)
        self.write()
        return trial

    def write(self) -> None:
        """Keeps the record."""
        self.record.write(self.shared.output_dir)

    def end(self) -> Record:
        """The record, when nothing more is tried.

        Raises:
            TrainingError: no trial could be trained.
        """
        if self.record.best is None:
            why = self.record.trials[-1].failure
            raise TrainingError(f"no trial could be trained: {why}", f"See {self.shared.output_dir}.")
        return self.record


def run(config: Config, varied: Sequence[Varied], trials: int, reporter: Reporter) -> Record:
    """Trains one adapter for each setting; what was trained before is not trained again.

    Args:
        config: the options that all trials share; `output_dir` is the sweep's folder.
        varied: what differs.
        trials: how many there shall be, at most; fewer where there are no more combinations.
        reporter: where progress is told.

    Raises:
        DataError: nothing is held out, so nothing tells which is best.
        TrainingError: no trial could be trained.
        KolotuneError: what makes every trial fail, as chats or a base that can't be used.
    """
    sweep = begin(config, varied, trials, reporter)
    while True:
        trial = next((known for known in sweep.record.trials if not known.is_over), None) or sweep.next()
        if trial is None:
            return sweep.end()
        _train(trial, sweep, reporter)
        sweep.write()


def begin(
    config: Config, varied: Sequence[Varied], trials: int, reporter: Reporter, *, elsewhere: bool = False
) -> Sweep:
    """Prepares the chats, and finds what every trial would fail of; see `run`.

    Args:
        config, varied, trials, reporter: see `run`.
        elsewhere: the trials are trained by other machines, which choose the arithmetic that suits them.
    """
    if not config.eval_split and not config.eval_data:
        raise _nothing_held_out()
    for each in varied:
        for value in each.choices:
            with_values(config, {each.name: value})  # an impossible one is told now
    chats = RunFolder(config.output_dir / _CHATS)
    shared = shared_elsewhere(config) if elsewhere else choose(config, chats)[0]
    shared = dataclasses.replace(shared, compare=False)
    # Whether the training fits is asked where it is done.
    ahead = _road_after(train.NAME if elsewhere else prepare.NAME)
    run_pipeline(dataclasses.replace(shared, output_dir=chats.root), reporter, [prepare.NAME], check_also=ahead)
    record = read(config.output_dir, varied, _made_of(chats, shared, varied))
    return Sweep(record, shared, chats, trials)


def shared_elsewhere(config: Config) -> Config:
    """The options of trials on other machines: with the date of the chats that are prepared here, or will be."""
    chosen, _ = choose(config, RunFolder(config.output_dir / _CHATS), [prepare.NAME])
    return dataclasses.replace(config, template_date=chosen.template_date)


def folder_of(trial: Trial, config: Config) -> RunFolder:
    """A trial's run folder."""
    return RunFolder(config.output_dir / trial.folder)


def config_of(trial: Trial, config: Config) -> Config:
    """The options of a trial's run folder."""
    return dataclasses.replace(with_values(config, trial.values), output_dir=folder_of(trial, config).root)


def _road_after(name: str) -> tuple[str, ...]:
    return STAGE_NAMES[STAGE_NAMES.index(name) + 1 :]


def _made_of(chats: RunFolder, shared: Config, varied: Sequence[Varied]) -> str:
    """A digest of what all trials have in common.

    Raises:
        DataError: no chats are held out.
    """
    record = read_record(chats, prepare.NAME)
    if record is None or not record.facts["held_out_chats"]:
        raise _nothing_held_out()
    names = {each.name for each in varied}
    options = {name: value for name, value in train.options(shared).items() if name not in names}
    outputs = {name: dataclasses.asdict(output) for name, output in record.outputs.items()}
    text = json.dumps([outputs, record.inputs, shared.base_model, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _nothing_held_out() -> DataError:
    return DataError(
        "no chats are held out, so nothing tells which setting is best", "Give --eval-split 0.1 or --eval-data."
    )


def in_words(trial: Trial) -> str:
    """A trial's values."""
    return ", ".join(f"{name} {value}" for name, value in trial.values.items())


def _train(trial: Trial, sweep: Sweep, reporter: Reporter) -> None:
    reporter.doing(f"trial {trial.number}: {in_words(trial)}")
    config = dataclasses.replace(config_of(trial, sweep.shared), use_checkpoint=True)
    folder = RunFolder(config.output_dir)
    share(sweep.chats, folder)
    try:
        run_pipeline(config, reporter, [prepare.NAME, train.NAME])
        trial.loss = loss_of(folder, config)
        reporter.success(f"trial {trial.number}: held-out loss {trial.loss:.4f} ({in_words(trial)})")
    except TrainingError as error:
        trial.failure = error.cause
        reporter.warning(f"trial {trial.number} failed: {error.cause}")


def share(chats: RunFolder, folder: RunFolder) -> None:
    """Gives a trial the prepared chats: links where the disk has them, with the record that they were made so."""
    if folder.prepared.exists():
        return
    folder.state.mkdir(parents=True, exist_ok=True)
    for source, target in ((chats.choices, folder.choices), (chats.record(prepare.NAME), folder.record(prepare.NAME))):
        shutil.copyfile(source, target)
    shutil.copytree(chats.prepared, folder.prepared, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def loss_of(folder: RunFolder, config: Config) -> float:
    """The held-out loss of the adapter that was kept: the last one, or the best where training stops early."""
    return kept_held_out_loss(held_out_losses(folder), early_stopping=bool(config.early_stopping))


def held_out_losses(folder: RunFolder) -> list[tuple[int, float]]:
    """(step, held-out loss) of each evaluation of a training; none where there is no metrics file."""
    return metrics.held_out_losses(read_metrics(folder.metrics)) if folder.metrics.is_file() else []


def rows(record: Record) -> list[dict[str, Any]]:
    """The trials as rows of a table, the best one first, those that failed last."""
    order = sorted(record.trials, key=lambda each: (each.loss is None, each.loss or 0.0, each.number))
    return [
        {"trial": each.number, **each.values, "loss": each.loss, "failure": each.failure}
        for each in order
        if each.is_over
    ]
