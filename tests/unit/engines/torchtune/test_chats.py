"""The recipe's dataloader: the native engine's ids, labels and order, and no chat dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.training import random_chats, write_tokens

from kolotune.engines.native import batches
from kolotune.engines.torchtune.inside.kolotune_recipe.chats import IGNORED, Chats, Loader, in_order

CHATS = 11


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "train.safetensors", random_chats(CHATS, 5))
    return tmp_path / "train.safetensors"


def agrees(batch: dict[str, torch.Tensor], theirs: batches.Tokens, indices: list[int]) -> None:
    """The batch holds just these chats, with just these labels."""
    assert len(batch["tokens"]) == len(indices)
    for ids, labels, index in zip(batch["tokens"], batch["labels"], indices, strict=True):
        wanted_ids, wanted = theirs.chat(index)
        length = len(wanted_ids)
        assert torch.equal(ids[:length], wanted_ids) and torch.equal(labels[1:length], wanted[1:])
        assert labels[0] == IGNORED and bool((labels[length:] == IGNORED).all())


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (3, 2), (4, 5), (20, 1)])
def test_the_steps_are_those_of_the_native_engine(file: Path, batch_size: int, accumulation: int) -> None:
    ours = Loader(Chats.load(file), batch_size, accumulation, seed=7)
    theirs = batches.Tokens.load(file)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        found = list(ours)
        assert len(found) == len(ours) and len(found) % accumulation == 0, "torchtune drops what makes no whole step"
        steps = list(batches.steps_of(CHATS, epoch, 7, batch_size * accumulation))
        assert len(steps) == len(found) // accumulation
        for number, step in enumerate(steps):
            mine = found[number * accumulation : (number + 1) * accumulation]
            real = [batch for batch in mine if (batch["labels"] != IGNORED).any()]
            rows = [step[at : at + batch_size] for at in range(0, len(step), batch_size)]
            assert len(real) == len(rows)
            for batch, indices in zip(real, rows, strict=True):
                agrees(batch, theirs, indices)
        assert sum(len(batch["tokens"]) for batch in found if batch["tokens"].shape[1] > 1) == CHATS


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (3, 2), (5, 1)])
def test_halved_batches_make_the_same_steps(file: Path, batch_size: int, accumulation: int) -> None:
    halvings, theirs = [1, 4], batches.Tokens.load(file)
    parts = -(-batch_size // (batch_size >> 2 or 1))
    loader = Loader(Chats.load(file), batch_size, accumulation, 7, halvings, parts)
    step = 0
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        found = list(loader)
        of_a_step = accumulation * parts
        assert len(found) == len(loader) and len(found) % of_a_step == 0
        for indices in batches.steps_of(CHATS, epoch, 7, batch_size * accumulation):
            mine, found = found[:of_a_step], found[of_a_step:]
            at_once = max(1, batch_size >> (step >= 1) + (step >= 4))
            rows = [
                indices[whole : whole + batch_size][at : at + at_once]
                for whole in range(0, len(indices), batch_size)
                for at in range(0, len(indices[whole : whole + batch_size]), at_once)
            ]
            real = [batch for batch in mine if (batch["labels"] != IGNORED).any()]
            assert len(real) == len(rows)
            for batch, row in zip(real, rows, strict=True):
                agrees(batch, theirs, row)
            step += 1
        assert not found


def test_tokens_are_counted_without_padding(file: Path) -> None:
    loader = Loader(Chats.load(file), 4, 2, seed=7)
    list(loader)
    assert loader.tokens_read == len(batches.Tokens.load(file).ids)


def test_evaluation_reads_every_chat_once(file: Path) -> None:
    theirs = batches.Tokens.load(file)
    order = batches.longest_first(theirs)
    assert sorted(order) == list(range(CHATS))
    for number, batch in enumerate(in_order(Chats.load(file), 4)):
        agrees(batch, theirs, order[number * 4 : (number + 1) * 4])
    assert number == 2


def test_a_label_on_the_first_token_does_not_count(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.safetensors", [([5, 6, 7], [1, 0, 1])])
    (batch,) = Loader(Chats.load(tmp_path / "train.safetensors"), 1, 1, seed=0)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7]]
