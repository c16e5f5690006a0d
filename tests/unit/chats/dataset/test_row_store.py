"""What the row store writes for chats of one sequence, and for chats of several."""

from __future__ import annotations

from array import array
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from kolotune.chats.dataset.chunks import ChunkResult
from kolotune.chats.dataset.row_store import RowStore, first_encoded, has_weights
from kolotune.chats.dataset.rows import USED, ChatRow
from kolotune.chats.reading.files import read_chats
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS


def _result(chats: list[list[int]]) -> ChunkResult:
    """Return chats whose sequences have these lengths; token n of all is n, and every third one is labelled."""
    result = ChunkResult(0)
    for lengths in chats:
        first, total = len(result.labelled), sum(lengths)
        result.ids += array("i", range(first, first + total)).tobytes()
        result.labelled += bytes(at % 3 == 0 for at in range(first, first + total))
        if len(lengths) > 1:
            result.lengths += array("i", lengths).tobytes()
        result.rows.append(ChatRow(0, 0, 0, 1, 0, 0, USED, 0, total, len(lengths), 0, 0, 0, 0, 0))
    return result


def _written(chats: list[list[int]], chosen: list[bool], folder: Path) -> dict[str, np.ndarray]:
    with RowStore(folder / "rows") as store:
        store.add(_result(chats[:2]))
        rest = _result(chats)
        rest.rows = rest.rows[2:]
        used = sum(map(sum, chats[:2]))
        rest.ids, rest.labelled = rest.ids[4 * used :], rest.labelled[used:]
        rest.lengths = _result(chats[2:]).lengths
        store.add(rest)
        store.close()
        labelled = store.write_tokens(store.rows(), np.array(chosen), folder / "tokens.safetensors")
    tokens = load_file(folder / "tokens.safetensors")
    assert labelled == tokens["labelled"].sum()
    return tokens


def test_chats_of_several_sequences_have_a_table(tmp_path: Path) -> None:
    tokens = _written([[2, 3, 4], [5], [6, 7], [1], [2, 2]], [True, True, False, True, True], tmp_path)
    assert tokens["offsets"].tolist() == [0, 2, 5, 9, 14, 15, 17, 19]
    assert tokens["chats"].tolist() == [0, 3, 4, 5, 7]
    assert tokens["ids"].tolist() == [*range(14), *range(27, 32)]
    assert tokens["offsets"].dtype == tokens["chats"].dtype == np.int64
    first = first_encoded(tmp_path / "tokens.safetensors")
    assert [ids for ids, _ in first] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    assert [label for _, labels in first for label in labels] == [at % 3 == 0 for at in range(9)]


def test_without_such_chats_there_is_no_table(tmp_path: Path) -> None:
    tokens = _written([[2], [5], [6, 7], [1]], [True, True, False, True], tmp_path)
    assert sorted(tokens) == ["ids", "labelled", "offsets"]
    assert tokens["offsets"].tolist() == [0, 2, 7, 8]
    assert first_encoded(tmp_path / "tokens.safetensors") == [([0, 1], [True, False])]


def _turns(number: int, *weights: float) -> list[dict[str, Any]]:
    return [
        turn
        for at, weight in enumerate(weights)
        for turn in (
            {"role": "user", "content": f"q {number} {at}"},
            {"role": "assistant", "content": f"a {number} {at}", "weight": weight},
        )
    ]


def test_weights_are_those_of_turns_and_records(prepare_records: Any) -> None:
    records = [
        {"messages": _turns(1, 0.25, 1)},
        {"messages": _turns(2, 1, 1)},
        {"messages": _turns(3, 0, 0.5), "weight": 0.5},
        {"messages": _turns(4, 1, 0)},
    ]
    prepared, folder = prepare_records(records, eval_split=0)
    facts = prepared.summary()
    assert (facts["weighted_turns"], facts["lowest_weight"], facts["highest_weight"]) == (2, 0.25, 0.25)
    assert facts["untrained_turns"] == 2
    tokens = load_file(folder / TRAIN_TOKENS)
    assert ((tokens["weights"] > 0) == (tokens["labelled"] == 1)).all()
    spans = list(pairwise(tokens["offsets"].tolist()))
    per_chat = [[value for value, _ in groupby(tokens["weights"][start:end].tolist()) if value] for start, end in spans]
    assert per_chat == [[0.25, 1.0], [1.0, 1.0], [0.25], [1.0]]
    assert facts["labelled_tokens"] == tokens["labelled"].sum()
    assert has_weights(folder / TRAIN_TOKENS)
    plain, folder = prepare_records(records[1:2], eval_split=0)
    assert plain.summary()["weighted_turns"] == 0 and not has_weights(folder / TRAIN_TOKENS)


def test_weights_stay_with_held_out_chats(prepare_records: Any, tmp_path: Path) -> None:
    held_out = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "weight": 0.3}]
    _, folder = prepare_records([{"messages": _turns(1, 1)}], held_out)
    (first,), (second,) = (read_chats([path]).chats for path in (tmp_path / "held_out.jsonl", folder / HELD_OUT_CHATS))
    assert first == second and second.messages[1].weight == 0.3
    assert not has_weights(folder / TRAIN_TOKENS) and has_weights(folder / HELD_OUT_TOKENS)
