"""A chat with several sequences is computed as a trunk with branches, and gives what each sequence gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import LabelledIds, TrainingFolder, write_tokens

from kolotune.engines.native.branches import branches_of, common_prefix
from kolotune.engines.native.kernels import build
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.sequence_packing import pack
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens


def labelled(ids: list[int], *places: int) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Return ids and labels, with labels at some places that count in full."""
    labels = torch.full((len(ids),), IGNORED)
    labels[list(places)] = torch.tensor(ids)[list(places)]
    return torch.tensor(ids), labels, None


def test_a_branch_shares_the_tokens_before_it_leaves() -> None:
    first, last = labelled([1, 2, 9, 5, 6], 3, 4), labelled([1, 2, 5, 6, 3, 9, 7], 6)
    trunk, branch = branches_of([first, last], share=True)
    assert trunk.ids.tolist() == [1, 2, 5, 6, 3, 9] and trunk.shared == 0
    assert trunk.label_positions.tolist() == [5] and trunk.targets.tolist() == [7]
    assert branch.ids.tolist() == [1, 2, 9, 5] and branch.shared == 2
    assert branch.label_positions.tolist() == [2, 3] and branch.targets.tolist() == [5, 6]
    assert branches_of([first, last], share=False)[1].shared == 0


def test_a_sequence_that_the_next_one_continues_costs_nothing() -> None:
    trunk, branch = branches_of([labelled([1, 2, 3], 2), labelled([1, 2, 3, 4, 5], 4)], share=True)
    assert len(trunk.ids) == 4 and branch.shared == len(branch.ids) == 2 and branch.label_positions.tolist() == [1]


def test_a_branch_leaves_the_branch_before_it() -> None:
    sequences = [labelled([1, 7, 8, 4], 3), labelled([1, 7, 8, 5, 6], 4), labelled([1, 2, 3], 2)]
    assert [branch.shared for branch in branches_of(sequences, share=True)] == [0, 1, 3]


def test_no_token_predicts_two_labels() -> None:
    both = [labelled([1, 2, 3, 4], 2, 3), labelled([1, 2, 3, 5], 2, 3)]
    assert [branch.shared for branch in branches_of(both, share=True)] == [0, 1]
    three = [labelled([1, 2, 3, 4], 3), labelled([1, 2, 3, 5], 3), labelled([1, 2, 3, 6], 3)]
    assert [branch.shared for branch in branches_of(three, share=True)] == [0, 2, 2]


def test_sequences_without_labels_are_left_out() -> None:
    sequences = [labelled([1, 2], 1), labelled([1, 2, 3]), labelled([1, 2, 3, 4], 3)]
    assert [len(branch.ids) for branch in branches_of(sequences, share=True)] == [3, 1]
    assert branches_of([labelled([1, 2, 3], 0)], share=True) == []


def test_the_prefix_of_several_chats_predicts_no_label() -> None:
    chats = [
        branches_of([labelled([1, 2, 3, 4, 9], 4), labelled([1, 2, 3, 4, 5, 6], 5)], share=True),
        branches_of([labelled([1, 2, 3, 4, 8], 3)], share=True),
    ]
    assert common_prefix(chats) == 2


@pytest.fixture(params=[False, True], ids=["plain", "compiled"], scope="module")
def model(request: pytest.FixtureRequest, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a function that gives the loss and the gradient of chats, and how many tokens were computed."""
    if request.param and build.reason_unavailable():
        pytest.skip(f"can't be compiled: {build.reason_unavailable()}")
    folder = TrainingFolder(tmp_path_factory.mktemp("branches"))
    tiny_model("llama", folder.root / "base")
    packed = PackedModel(folder.job(compile=request.param))
    torch.manual_seed(1)
    with torch.no_grad():
        for pair in packed.adapters.values():
            pair.lora_B.normal_(std=0.05)
    packed.updated()

    def computed(chats: Any, share: bool) -> tuple[float, torch.Tensor, int]:
        write_tokens(folder.root / "tokens", chats)
        tokens = PreparedTokens.load(folder.root / "tokens")
        gradient = packed.flat.parameter.grad
        assert gradient is not None
        gradient.zero_()
        sequence = pack(tokens, range(len(tokens)), share)
        assert len(sequence.label_positions.unique()) == sequence.labels
        loss = float(packed.decoder.backward(sequence, 0.1, recompute=False))
        return loss, gradient.clone(), len(sequence.ids)

    yield computed


token = st.integers(0, 3)  # so few that sequences often continue each other by chance


@st.composite
def chats(draw: st.DrawFn) -> list[list[LabelledIds]]:
    """Draw chats whose sequences begin as another one does, up to any place, with any labels."""
    made: list[list[LabelledIds]] = []
    start = draw(st.lists(token, max_size=12))
    for _ in range(draw(st.integers(1, 3))):
        sequences: list[LabelledIds] = []
        for _ in range(draw(st.integers(1, 5))):
            before = sequences[-1][0] if sequences else start
            kept = list(before[: draw(st.integers(0, len(before)))])
            ids = (kept if sequences else start) + draw(st.lists(token, min_size=2, max_size=20))
            labels = draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
            only_behind = draw(st.booleans())
            sequences.append((ids, [0] * len(kept) + labels[len(kept) :] if only_behind else labels))
        made.append(sequences)
    return made


@settings(max_examples=60, deadline=None)
@given(examples=chats())
def test_losses_and_gradients_equal_those_of_separate_sequences(model: Any, examples: list[list[LabelledIds]]) -> None:
    loss, gradient, shared = model(examples, True)
    alone = [model([sequence], False) for chat in examples for sequence in chat]
    assert loss == pytest.approx(sum(each[0] for each in alone), rel=1e-5, abs=1e-5)
    wanted = torch.stack([each[1] for each in alone]).sum(0)
    torch.testing.assert_close(gradient, wanted, atol=2e-5 * float(wanted.abs().max()) + 1e-9, rtol=1e-4)
    assert shared <= max(sum(each[2] for each in alone), 1)


def test_each_new_token_is_computed_once(model: Any) -> None:
    """Count the trunk, and for each earlier answer its opening and the answer, without the last label of each."""
    question, opening, answer = list(range(20, 30)), [1, 2], list(range(40, 48))
    history, chat = [], []
    for _ in range(4):
        history += question
        chat.append(([*history, *opening, *answer], [0] * len(history) + [0, 0] + [1] * 8))
        history += answer
    assert model([chat], True)[2] == (4 * 18 + 2 - 1) + 3 * (2 + 8 - 1)
    assert model([chat], False)[2] == sum(len(ids) - 1 for ids, _ in chat)
