"""Choose the next trial: all combinations in turn, or what Optuna's search derives from the trials so far."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.installation import install_command

from .record import SweepRecord, Trial
from .space import Value, VariedOption, count_combinations

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_DIGITS = 3  # of fractional numbers; more would make no difference


def next_values(record: SweepRecord, trials: int, seed: int) -> dict[str, Value] | None:
    """Return the values of the next trial; None when there is none.

    All combinations are tried in order, if there are no more than `trials`. Otherwise the tree-structured Parzen
    estimator of Optuna (Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011) chooses, at random at
    first. It is set up again for each trial from all trials so far, so that a stopped sweep resumes as if it had not
    been stopped. Running trials count as bad ("constant liar"), so that the next one is not nearly the same.

    Args:
        record: the trials so far, the running ones included.
        trials: the maximum number of trials.
        seed: of the search.
    """
    if len(record.trials) >= trials:
        return None
    count = count_combinations(record.varied)
    if count is not None and count <= trials:
        tried = [trial.values for trial in record.trials]  # in any order, after a search with fewer trials
        return next((values for values in _combinations(record.varied) if values not in tried), None)
    return _search(record, seed)


def _combinations(varied: Sequence[VariedOption]) -> list[dict[str, Value]]:
    names = [option.name for option in varied]
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*(option.choices for option in varied))
    ]


def _search(record: SweepRecord, seed: int) -> dict[str, Value]:
    try:
        import optuna
    except ImportError:
        raise ToolchainError(
            "a search needs optuna", f"To install it, {install_command('sweep')}; or give values with commas."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():  # Optuna 4 calls constant_liar experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=(seed + len(record.trials)) % 2**32, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    space: dict[str, BaseDistribution] = {option.name: option.distribution() for option in record.varied}
    for trial in record.trials:
        study.add_trial(_frozen_trial(trial, space))
    chosen = study.ask(space)
    return {option.name: _rounded(chosen.params[option.name], option) for option in record.varied}


def _frozen_trial(trial: Trial, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    import optuna

    states = optuna.trial.TrialState
    is_trained = trial.loss is not None and math.isfinite(trial.loss)
    return optuna.trial.create_trial(
        state=states.COMPLETE if is_trained else states.FAIL if trial.has_ended else states.RUNNING,
        params=trial.values,
        distributions=dict(space),
        value=trial.loss if is_trained else None,
    )


def _rounded(value: Value, option: VariedOption) -> Value:
    if isinstance(value, float):
        return min(max(float(f"{value:.{_DIGITS}g}"), option.low), option.high)
    return value
