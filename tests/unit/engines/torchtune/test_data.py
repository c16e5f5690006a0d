"""The recipe's dataloader yields the ids, labels and order of the native engine, and drops no chat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.training import branching_chats, random_chats, write_tokens

from kolotune.engines import prepared_tokens
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.engines.torchtune.inside.kolotune_recipe.data import (
    IGNORED,
    Loader,
    TokenizedChats,
    evaluation_batches,
    share,
)

CHATS = 11


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "train.safetensors", random_chats(CHATS, 5))
    return tmp_path / "train.safetensors"


def assert_holds(batch: dict[str, torch.Tensor], theirs: PreparedTokens, indices: list[int]) -> None:
    """Assert that the batch holds exactly these chats, with exactly these labels."""
    assert len(batch["tokens"]) == len(indices)
    for ids, labels, index in zip(batch["tokens"], batch["labels"], indices, strict=True):
        wanted_ids, wanted = theirs.sequence(index)
        length = len(wanted_ids)
        assert torch.equal(ids[:length], wanted_ids) and torch.equal(labels[1:length], wanted[1:])
        assert labels[0] == IGNORED and bool((labels[length:] == IGNORED).all())


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (3, 2), (4, 5), (20, 1)])
def test_the_steps_equal_those_of_the_native_engine(file: Path, batch_size: int, accumulation: int) -> None:
    ours = Loader(TokenizedChats.load(file), batch_size, accumulation, seed=7)
    theirs = PreparedTokens.load(file)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        found = list(ours)
        assert len(found) == len(ours) and len(found) % accumulation == 0, "torchtune drops incomplete steps"
        steps = list(prepared_tokens.epoch_steps(CHATS, epoch, 7, batch_size * accumulation))
        assert len(steps) == len(found) // accumulation
        for number, step in enumerate(steps):
            mine = found[number * accumulation : (number + 1) * accumulation]
            real = [batch for batch in mine if (batch["labels"] != IGNORED).any()]
            rows = [step[at : at + batch_size] for at in range(0, len(step), batch_size)]
            assert len(real) == len(rows)
            for batch, indices in zip(real, rows, strict=True):
                assert_holds(batch, theirs, indices)
        assert sum(len(batch["tokens"]) for batch in found if batch["tokens"].shape[1] > 1) == CHATS


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (3, 2), (5, 1)])
def test_halved_batches_give_the_same_steps(file: Path, batch_size: int, accumulation: int) -> None:
    backoff_steps, theirs = [1, 4], PreparedTokens.load(file)
    parts = -(-batch_size // (batch_size >> 2 or 1))
    loader = Loader(TokenizedChats.load(file), batch_size, accumulation, 7, backoff_steps)
    step = 0
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        found = list(loader)
        per_step = accumulation * parts
        assert len(found) == len(loader) and len(found) % per_step == 0
        for indices in prepared_tokens.epoch_steps(CHATS, epoch, 7, batch_size * accumulation):
            mine, found = found[:per_step], found[per_step:]
            at_once = max(1, batch_size >> (step >= 1) + (step >= 4))
            rows = [
                indices[whole : whole + batch_size][at : at + at_once]
                for whole in range(0, len(indices), batch_size)
                for at in range(0, len(indices[whole : whole + batch_size]), at_once)
            ]
            real = [batch for batch in mine if (batch["labels"] != IGNORED).any()]
            assert len(real) == len(rows)
            for batch, row in zip(real, rows, strict=True):
                assert_holds(batch, theirs, row)
            step += 1
        assert not found


def labels_of(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Return the labels of each chat, without padding and filler chats."""
    rows = [row[row != IGNORED].tolist() for batch in batches for row in batch["labels"]]
    return sorted(row for row in rows if row)


@pytest.mark.parametrize(("batch_size", "accumulation", "size"), [(4, 1, 2), (1, 3, 2), (3, 2, 4), (1, 1, 3)])
@pytest.mark.parametrize("backoff_steps", [[], [1, 4]])
def test_several_processes_share_each_step(
    file: Path, batch_size: int, accumulation: int, size: int, backoff_steps: list[int]
) -> None:
    alone = Loader(TokenizedChats.load(file), batch_size, accumulation, 7, backoff_steps)
    parts = [
        Loader(TokenizedChats.load(file), batch_size, accumulation, 7, backoff_steps, rank, size)
        for rank in range(size)
    ]
    steps = -(-CHATS // (batch_size * accumulation))
    for epoch in (0, 1):
        found = []
        for each in (alone, *parts):
            each.set_epoch(epoch)
            read = list(each)
            assert len(read) == len(each) and len(read) % steps == 0
            assert max(len(batch["tokens"]) for batch in read) <= batch_size
            per_step = len(read) // steps
            found.append([read[number * per_step : (number + 1) * per_step] for number in range(steps)])
        assert len({len(each[0]) for each in found[1:]}) == 1, "all processes must compute the same number of batches"
        if not backoff_steps:
            assert len(found[1][0]) == -(-batch_size * accumulation // (size * batch_size))
        for number in range(steps):
            together = [batch for each in found[1:] for batch in each[number]]
            assert labels_of(together) == labels_of(found[0][number])
    assert alone.tokens_read == parts[0].tokens_read == parts[-1].tokens_read


def test_shares_are_balanced(file: Path) -> None:
    chats = TokenizedChats.load(file)
    shares = [share(chats, range(CHATS), rank, 3) for rank in range(3)]
    assert sorted(each for part in shares for each in part) == list(range(CHATS))
    assert {len(part) for part in shares} == {3, 4}


@pytest.mark.parametrize("size", [2, 4, 12])
def test_processes_share_the_evaluation(file: Path, size: int) -> None:
    alone = list(evaluation_batches(TokenizedChats.load(file), 2))
    parts = [list(evaluation_batches(TokenizedChats.load(file), 2, rank, size)) for rank in range(size)]
    assert len({len(part) for part in parts}) == 1
    assert labels_of([batch for part in parts for batch in part]) == labels_of(alone)


def test_tokens_are_counted_without_padding(file: Path) -> None:
    loader = Loader(TokenizedChats.load(file), 4, 2, seed=7)
    list(loader)
    assert loader.tokens_read == len(PreparedTokens.load(file).ids)


def test_evaluation_reads_every_chat_once(file: Path) -> None:
    theirs = PreparedTokens.load(file)
    order = prepared_tokens.longest_first(theirs)
    assert sorted(order) == list(range(CHATS))
    for number, batch in enumerate(evaluation_batches(TokenizedChats.load(file), 4)):
        assert_holds(batch, theirs, order[number * 4 : (number + 1) * 4])
    assert number == 2


@pytest.mark.parametrize("size", [1, 2])
def test_the_sequences_of_a_chat_are_in_one_batch(tmp_path: Path, size: int) -> None:
    write_tokens(tmp_path / "train.safetensors", branching_chats(CHATS, 3))
    chats, theirs = (kind.load(tmp_path / "train.safetensors") for kind in (TokenizedChats, PreparedTokens))
    assert len(chats) == CHATS < len(chats.offsets) - 1
    assert [chats.length(index) for index in range(CHATS)] == theirs.chat_lengths().tolist()
    assert [chats.cost(index) for index in range(CHATS)] == list(map(theirs.unshared_length, range(CHATS)))
    found = []
    for rank in range(size):
        loader = Loader(chats, 3, 1, 7, (), rank, size)
        assert len(list(loader)) == len(loader)
        assert loader.tokens_read == int(theirs.chat_lengths().sum())
        found += list(loader)
    if size == 1:
        for batch, step in zip(found, prepared_tokens.epoch_steps(CHATS, 0, 7, 3), strict=True):
            assert_holds(batch, theirs, [number for index in step for number in theirs.sequences(index)])
    everything = [theirs.sequence(number)[1][1:] for number in range(len(theirs.offsets) - 1)]
    assert labels_of(found) == sorted(labels[labels != IGNORED].tolist() for labels in everything)
    assert labels_of(list(evaluation_batches(chats, 2))) == labels_of(found)


def test_a_label_on_the_first_token_does_not_count(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.safetensors", [([5, 6, 7], [1, 0, 1])])
    (batch,) = Loader(TokenizedChats.load(tmp_path / "train.safetensors"), 1, 1, seed=0)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7]]
