"""The choice of the next trial."""

from __future__ import annotations

from typing import Any

from kolotune.sweeping.record import SweepRecord, Trial
from kolotune.sweeping.search import next_values
from kolotune.sweeping.space import VariedOption

RANK, DECAY = VariedOption("lora_rank", ("8", "16")), VariedOption("weight_decay", ("0", "0.1"))
RATE = VariedOption("learning_rate", low=1e-5, high=1e-1)


def search(record: SweepRecord, trials: int, loss: Any, seed: int = 1) -> list[dict[str, Any]]:
    while (values := next_values(record, trials, seed)) is not None:
        result = loss(values)
        record.trials.append(Trial(len(record.trials) + 1, values, result, "" if result else "it failed"))
    return [trial.values for trial in record.trials]


def test_few_combinations_are_all_tried_once() -> None:
    values = search(SweepRecord([RANK, DECAY], ""), 10, lambda values: 1.0)
    assert values == [
        {"lora_rank": rank, "weight_decay": decay} for rank in ("8", "16") for decay in ("0", "0.1")
    ]  # fmt: skip


def test_a_search_ends_after_the_maximum_of_trials() -> None:
    assert len(search(SweepRecord([RANK, DECAY], ""), 3, lambda values: 1.0)) == 3


def test_a_larger_maximum_tries_the_remaining_combinations() -> None:
    record = SweepRecord([RANK, DECAY], "")
    search(record, 3, lambda values: 1.0, seed=5)
    before = list(record.trials)
    values = search(record, 10, lambda values: 1.0)
    distinct = [each for at, each in enumerate(values) if each not in values[:at]]
    assert len(distinct) == 4 and record.trials[:3] == before


def test_a_search_approaches_the_best_within_the_range() -> None:
    values = search(SweepRecord([RATE], ""), 30, lambda values: 1 + abs(values["learning_rate"] - 0.002))
    assert all(1e-5 <= each["learning_rate"] <= 1e-1 for each in values)
    assert min(abs(each["learning_rate"] - 0.002) for each in values) < 0.001
    late = [each["learning_rate"] for each in values[15:]]
    assert sum(rate < 0.02 for rate in late) > len(late) / 2


def test_running_trials_are_avoided() -> None:
    record = SweepRecord([RANK, DECAY], "")
    values = [add_trial(record, 10) for _ in range(4)]
    assert [values.count(each) for each in values] == [1] * 4 and next_values(record, 10, 1) is None
    # A search counts running trials as bad, and tries nothing near them.
    record = SweepRecord([RATE], "")
    search(record, 20, lambda values: 1 + abs(values["learning_rate"] - 0.002))
    before = list(record.trials)
    parallel = [add_trial(record, 100)["learning_rate"] for _ in range(5)]
    assert len(set(parallel)) == 5
    ended = [Trial(trial.number, trial.values, None, "it failed") for trial in record.trials[20:24]]
    assert next_values(SweepRecord([RATE], "", [*before, *ended]), 100, 1) != {"learning_rate": parallel[4]}


def add_trial(record: SweepRecord, trials: int) -> dict[str, Any]:
    """Add a trial, which is running from now on; return its values."""
    values = next_values(record, trials, 1)
    assert values is not None
    record.trials.append(Trial(len(record.trials) + 1, values))
    return values


def test_a_stopped_search_resumes_as_if_it_had_not_been_stopped() -> None:
    def loss(values: dict[str, Any]) -> float | None:
        return None if values["learning_rate"] > 0.05 else values["learning_rate"]

    whole = search(SweepRecord([RATE, RANK], ""), 16, loss)
    first = SweepRecord([RATE, RANK], "")
    search(first, 5, loss)
    resumed = SweepRecord([RATE, RANK], "", list(first.trials))
    assert search(resumed, 16, loss) == whole
    assert search(SweepRecord([RATE, RANK], ""), 16, loss, seed=2) != whole
