"""The trials of a sweep: each is a run folder over the same prepared chats. `run` trains one after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence

from kolotune.foundation.config import Config
from kolotune.foundation.errors import DataError, TrainingError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.pipeline.choices import choose
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder import metrics
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import kept_held_out_loss, read_metrics
from kolotune.run_folder.records import read_record
from kolotune.stages import prepare, train

from .record import SweepRecord, Trial, read_or_create
from .search import next_values
from .space import VariedOption, with_values

_CHATS = "chats"  # the run folder that only prepares


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep whose chats are prepared.

    Attributes:
        record: its trials so far.
        shared: the options that all trials share; `output_dir` is the sweep's folder.
        chats: the run folder with the prepared chats.
        trials: the maximum number of trials.
    """

    record: SweepRecord
    shared: Config
    chats: RunFolder
    trials: int

    def next_trial(self) -> Trial | None:
        """Add a new trial to the record, so that a resumed sweep has it too; None when there is none left."""
        values = next_values(self.record, self.trials, self.shared.seed)
        if values is None:
            return None
        trial = Trial(len(self.record.trials) + 1, values)
        self.record.trials.append(trial)
        self.write()
        return trial

    def write(self) -> None:
        """Write the record."""
        self.record.write(self.shared.output_dir)

    def finish(self) -> SweepRecord:
        """Return the record after the last trial.

        Raises:
            TrainingError: no trial could be trained.
        """
        if self.record.best is None:
            reason = self.record.trials[-1].failure
            raise TrainingError(f"no trial could be trained: {reason}", f"See {self.shared.output_dir}.")
        return self.record


def run(config: Config, varied: Sequence[VariedOption], trials: int, reporter: Reporter) -> SweepRecord:
    """Train one adapter for each setting that is not trained yet.

    Args:
        config: the options that all trials share; `output_dir` is the sweep's folder.
        varied: the varied options.
        trials: the maximum number of trials; there are fewer with fewer combinations.
        reporter: shows progress.

    Raises:
        DataError: no chats are held out, so the trials can't be compared.
        TrainingError: no trial could be trained.
        KolotuneError: something makes every trial fail, such as unusable chats or an unusable base model.
    """
    sweep = start(config, varied, trials, reporter)
    while True:
        trial = next((trial for trial in sweep.record.trials if not trial.has_ended), None) or sweep.next_trial()
        if trial is None:
            return sweep.finish()
        _train(trial, sweep, reporter)
        sweep.write()


def start(
    config: Config, varied: Sequence[VariedOption], trials: int, reporter: Reporter, *, elsewhere: bool = False
) -> Sweep:
    """Prepare the chats and check what would make every trial fail; see `run`.

    Args:
        config, varied, trials, reporter: see `run`.
        elsewhere: other machines train the trials, and choose the arithmetic that suits them.
    """
    if not config.eval_split and not config.eval_data:
        raise _nothing_held_out()
    for option in varied:
        for choice in option.choices:
            with_values(config, {option.name: choice})  # report an impossible value now
    chats = RunFolder(config.output_dir / _CHATS)
    shared = shared_elsewhere(config) if elsewhere else choose(config, chats)[0]
    shared = dataclasses.replace(shared, compare=False)
    # Whether the training fits is checked where it runs.
    check_also = _stages_after(train.NAME if elsewhere else prepare.NAME)
    run_pipeline(dataclasses.replace(shared, output_dir=chats.root), reporter, [prepare.NAME], check_also=check_also)
    record = read_or_create(config.output_dir, varied, _digest(chats, shared, varied))
    return Sweep(record, shared, chats, trials)


def shared_elsewhere(config: Config) -> Config:
    """Return the options of trials on other machines, with the date of the chats that are prepared here."""
    chosen, _ = choose(config, RunFolder(config.output_dir / _CHATS), [prepare.NAME])
    return dataclasses.replace(config, template_date=chosen.template_date)


def folder_of(trial: Trial, config: Config) -> RunFolder:
    """Return a trial's run folder."""
    return RunFolder(config.output_dir / trial.folder)


def config_of(trial: Trial, config: Config) -> Config:
    """Return the options of a trial's run folder."""
    return dataclasses.replace(with_values(config, trial.values), output_dir=folder_of(trial, config).root)


def _stages_after(name: str) -> tuple[str, ...]:
    return STAGE_NAMES[STAGE_NAMES.index(name) + 1 :]


def _digest(chats: RunFolder, shared: Config, varied: Sequence[VariedOption]) -> str:
    """Return a digest of what all trials share.

    Raises:
        DataError: no chats are held out.
    """
    record = read_record(chats, prepare.NAME)
    if record is None or not record.facts["held_out_chats"]:
        raise _nothing_held_out()
    names = {option.name for option in varied}
    options = {name: value for name, value in train.options(shared).items() if name not in names}
    outputs = {name: dataclasses.asdict(output) for name, output in record.outputs.items()}
    text = json.dumps([outputs, record.inputs, shared.base_model, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _nothing_held_out() -> DataError:
    return DataError("no chats are held out, so trials can't be compared", "Give --eval-split 0.1 or --eval-data.")


def _train(trial: Trial, sweep: Sweep, reporter: Reporter) -> None:
    reporter.doing(f"trial {trial.number}: {trial.describe()}")
    config = dataclasses.replace(config_of(trial, sweep.shared), use_checkpoint=True)
    folder = RunFolder(config.output_dir)
    share_chats(sweep.chats, folder)
    try:
        run_pipeline(config, reporter, [prepare.NAME, train.NAME])
        trial.loss = loss_of(folder, config)
        reporter.success(f"trial {trial.number}: held-out loss {trial.loss:.4f} ({trial.describe()})")
    except TrainingError as error:
        trial.failure = error.cause
        reporter.warning(f"trial {trial.number} failed: {error.cause}")


def share_chats(chats: RunFolder, folder: RunFolder) -> None:
    """Give a trial the prepared chats, as hard links where the disk has them, with their record."""
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
    """Return the held-out loss of the adapter that was kept: the last one, or the best with early stopping."""
    return kept_held_out_loss(read_metrics(folder.metrics), early_stopping=bool(config.early_stopping))


def held_out_losses(folder: RunFolder) -> list[tuple[int, float]]:
    """Return (step, held-out loss) of each evaluation of a training; none where there is no metrics file."""
    return metrics.held_out_losses(read_metrics(folder.metrics)) if folder.metrics.is_file() else []


def table_rows(record: SweepRecord) -> list[JsonObject]:
    """Return the ended trials as rows of a table, the best one first, those that failed last."""
    ended = [trial for trial in record.trials if trial.has_ended]
    return [
        {"trial": trial.number, **trial.values, "loss": trial.loss, "failure": trial.failure}
        for trial in sorted(ended, key=lambda trial: (trial.loss is None, trial.loss or 0.0, trial.number))
    ]
