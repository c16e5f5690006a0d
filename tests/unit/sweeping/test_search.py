"""What is tried next."""

from __future__ import annotations

from typing import Any

from kolotune.sweeping.record import Record, Trial
from kolotune.sweeping.search import next_values
from kolotune.sweeping.space import Varied

RANK, DECAY = Varied("lora_rank", ("8", "16")), Varied("weight_decay", ("0", "0.1"))
RATE = Varied("learning_rate", low=1e-5, high=1e-1)


def searched(record: Record, trials: int, loss: Any, seed: int = 1) -> list[dict[str, Any]]:
    while (values := next_values(record, trials, seed)) is not None:
        found = loss(values)
        record.trials.append(Trial(len(record.trials) + 1, values, found, "" if found else "it failed"))
    return [each.values for each in record.trials]


def test_few_combinations_are_all_tried_once() -> None:
    found = searched(Record([RANK, DECAY], ""), 10, lambda values: 1.0)
    assert found == [
        {"lora_rank": rank, "weight_decay": decay} for rank in ("8", "16") for decay in ("0", "0.1")
    ]  # fmt: skip


def test_more_are_searched_and_no_more_than_asked_for() -> None:
    assert len(searched(Record([RANK, DECAY], ""), 3, lambda values: 1.0)) == 3


def test_what_a_search_left_out_is_tried_when_more_is_asked_for() -> None:
    record = Record([RANK, DECAY], "")
    searched(record, 3, lambda values: 1.0, seed=5)
    before = list(record.trials)
    found = searched(record, 10, lambda values: 1.0)
    distinct = [values for at, values in enumerate(found) if values not in found[:at]]
    assert len(distinct) == 4 and record.trials[:3] == before


def test_a_search_comes_near_the_best_and_stays_in_the_range() -> None:
    found = searched(Record([RATE], ""), 30, lambda values: 1 + abs(values["learning_rate"] - 0.002))
    assert all(1e-5 <= each["learning_rate"] <= 1e-1 for each in found)
    assert min(abs(each["learning_rate"] - 0.002) for each in found) < 0.001
    late = [each["learning_rate"] for each in found[15:]]
    assert sum(rate < 0.02 for rate in late) > len(late) / 2


def test_with_some_at_work_the_next_is_another() -> None:
    record = Record([RANK, DECAY], "")
    found = [add_one(record, 10) for _ in range(4)]
    assert [found.count(each) for each in found] == [1] * 4 and next_values(record, 10, 1) is None
    # Of what a search looks at, what is at work counts as bad: nothing near it is tried beside it.
    record = Record([RATE], "")
    searched(record, 20, lambda values: 1 + abs(values["learning_rate"] - 0.002))
    before = list(record.trials)
    beside = [add_one(record, 100)["learning_rate"] for _ in range(5)]
    assert len(set(beside)) == 5
    ended = [Trial(each.number, each.values, None, "it failed") for each in record.trials[20:24]]
    assert next_values(Record([RATE], "", [*before, *ended]), 100, 1) != {"learning_rate": beside[4]}


def add_one(record: Record, trials: int) -> dict[str, Any]:
    """A trial that is at work from now on."""
    values = next_values(record, trials, 1)
    assert values is not None
    record.trials.append(Trial(len(record.trials) + 1, values))
    return values


def test_one_that_was_stopped_goes_on_as_it_would_have() -> None:
    def loss(values: dict[str, Any]) -> float | None:
        return None if values["learning_rate"] > 0.05 else values["learning_rate"]

    whole = searched(Record([RATE, RANK], ""), 16, loss)
    begun = Record([RATE, RANK], "")
    searched(begun, 5, loss)
    again = Record([RATE, RANK], "", list(begun.trials))
    assert searched(again, 16, loss) == whole
    assert searched(Record([RATE, RANK], ""), 16, loss, seed=2) != whole
