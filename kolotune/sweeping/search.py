"""What is tried next: all combinations, or what Optuna's search takes from the trials so far."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

from kolotune.foundation.errors import ToolchainError

from .record import Record, Trial
from .space import Varied, combinations

_DIGITS = 3  # of numbers with a point: more would tell nothing


def next_values(record: Record, trials: int, seed: int) -> dict[str, Any] | None:
    """The values of the next trial; None when all were had.

    All combinations in their order where there are no more than `trials`; otherwise the tree-structured Parzen
    estimator of Optuna (Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011), which begins at random.
    It is asked anew each time, with all trials so far, so that a sweep that was stopped goes on as it would have. What
    is at work counts as bad until it is over ("constant liar"), so that the next is not nearly the same.

    Args:
        record: of the trials so far, those at work among them.
        trials: how many there shall be in all.
        seed: of the search.
    """
    if len(record.trials) >= trials:
        return None
    count = combinations(record.varied)
    if count is not None and count <= trials:
        tried = [trial.values for trial in record.trials]  # in any order, where a search came before
        return next((values for values in _all(record.varied) if values not in tried), None)
    return _searched(record, seed)


def _all(varied: Sequence[Varied]) -> list[dict[str, Any]]:
    names = [each.name for each in varied]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(each.choices for each in varied))]


def _searched(record: Record, seed: int) -> dict[str, Any]:
    try:
        import optuna
    except ImportError:
        raise ToolchainError(
            "a search needs optuna", "Install it: pip install 'kolotune[sweep]', or give values with commas."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():  # Optuna 4 calls the liar an experiment
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=(seed + len(record.trials)) % 2**32, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    space = {each.name: each.distribution for each in record.varied}
    for trial in record.trials:
        study.add_trial(_known(trial, space))
    asked = study.ask(space)
    return {each.name: _rounded(asked.params[each.name], each) for each in record.varied}


def _known(trial: Trial, space: dict[str, Any]) -> Any:
    import optuna

    states = optuna.trial.TrialState
    trained = trial.loss is not None and math.isfinite(trial.loss)
    return optuna.trial.create_trial(
        state=states.COMPLETE if trained else states.FAIL if trial.is_over else states.RUNNING,
        params=trial.values,
        distributions=space,
        value=trial.loss if trained else None,
    )


def _rounded(value: Any, of: Varied) -> Any:
    return min(max(float(f"{value:.{_DIGITS}g}"), of.low), of.high) if isinstance(value, float) else value
