"""From documents to packed sequences, with SmolLM2's real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kolotune.base_models import packaged_model
from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.dataset.prepared import Prepared, require_good
from kolotune.chats.dataset.text_report import report_documents
from kolotune.chats.tokens.text_encoder import TextEncoder
from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.foundation import config as configs
from kolotune.foundation.errors import DataError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS

DOCUMENTS = [f"Page {number}. " + "The lamp is lit at dusk. " * (number % 40) for number in range(60)]
Preparer = Callable[..., tuple[Prepared, Path]]


def pieces(file: Path) -> list[list[list[int]]]:
    """Return the pieces of each packed sequence; the loss falls on all but the first token of each."""
    loaded = load_file(file)
    ids, offsets = loaded["ids"].tolist(), loaded["offsets"].tolist()
    for start, end in pairwise(offsets):
        assert loaded["labelled"][start:end].tolist() == [0] + [1] * (end - start - 1)
    chats = loaded["chats"].tolist()
    return [
        [ids[offsets[number] : offsets[number + 1]] for number in range(start, end)] for start, end in pairwise(chats)
    ]


def test_every_token_is_in_one_packed_sequence(prepare_records: Preparer, reporter: PlainReporter) -> None:
    records = [{"text": text} for text in DOCUMENTS]
    prepared, folder = prepare_records(records, objective="text", max_seq_length=64, eval_split=0.1)
    require_good(prepared, skip_bad=False)
    assert prepared.text is not None and prepared.noun == "document"
    encoded = TextEncoder(load_tokenizer(packaged_model.unpack(reporter))).encode_all(DOCUMENTS)
    expected = [ids for ids in encoded if not isinstance(ids, DataError)]
    files = [folder / TRAIN_TOKENS, folder / HELD_OUT_TOKENS]
    packed = [sequence for file in files for sequence in pieces(file)]
    assert all(sum(map(len, sequence)) <= 64 for sequence in packed)
    assert sum(len(piece) - 1 for sequence in packed for piece in sequence) == sum(len(ids) - 1 for ids in expected)
    assert sorted(token for sequence in packed for piece in sequence for token in piece[1:]) == sorted(
        token for ids in expected for token in ids[1:]
    )
    assert prepared.train.labelled + prepared.held_out.labelled == sum(len(ids) - 1 for ids in expected)
    assert prepared.train.chats + prepared.held_out.chats == 60
    facts = prepared.summary()
    assert facts["packed_sequences"] == len(pieces(files[0]))
    assert facts["cut_documents"] == sum(len(ids) > 64 for ids in expected) > 0
    held_out = [json.loads(line)["text"] for line in (folder / HELD_OUT_CHATS).read_text().splitlines()]
    assert len(held_out) == prepared.held_out.chats > 0 and set(held_out) < set(DOCUMENTS)


def test_held_out_documents_are_held_out_whole(prepare_records: Preparer) -> None:
    """No piece of a document is in the other part."""
    prepared, folder = prepare_records(
        [{"text": f"Only {n} " + f"word{n} " * 80} for n in range(30)], objective="text", max_seq_length=32,
        eval_split=0.2,
    )  # fmt: skip
    numbers = []
    for file in (TRAIN_TOKENS, HELD_OUT_TOKENS):
        text = " ".join(prepared.tokenizer.decode(piece) for each in pieces(folder / file) for piece in each)
        numbers.append({n for n in range(30) if f"Only {n} " in text})
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 30 and numbers[1]


def test_copies_bad_and_special_documents_are_counted(prepare_records: Preparer) -> None:
    records: list[Any] = [{"text": "one page", "url": "a"}, {"text": "one page", "url": "b"}, {"text": ""}]
    prepared, folder = prepare_records([*records, {"text": "ends <|im_end|> here"}], objective="text", eval_split=0)
    assert prepared.duplicates.count == 1 and prepared.unread["url"] == 2 and len(prepared.problems) == 1
    with pytest.raises(DataError) as raised:
        require_good(prepared, skip_bad=False)
    assert "documents" in raised.value.cause and "that document" in str(raised.value.hint)
    require_good(prepared, skip_bad=True)
    ((first, second),) = pieces(folder / TRAIN_TOKENS)
    assert first.count(2) == second.count(2) == 1, "the text of a special token is plain text"


def test_the_files_are_the_same_with_any_number_of_processes(tmp_path: Path, reporter: PlainReporter) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "b.txt").write_text("A book. " * 300)
    values = {"train_data": [tmp_path / "a.jsonl", tmp_path / "b.txt"], "objective": "text", "max_seq_length": 64}
    config, base = configs.resolve((values, "test", tmp_path)), packaged_model.unpack(reporter)
    contents = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        prepare_chats(config, base, folder, processes=processes)
        contents.append([(folder / name).read_bytes() for name in (TRAIN_TOKENS, HELD_OUT_TOKENS, HELD_OUT_CHATS)])
    assert contents[0] == contents[1]


def test_near_duplicates_are_reported_and_stay(
    prepare_records: Preparer, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [" ".join(f"w{(number * 37 + at) % 997}" for at in range(60)) for number in range(0, 900, 100)]
    texts.append(texts[2].replace("w440", "other"))
    nearly = texts[4].rpartition(" ")[0] + " end"
    prepared, _ = prepare_records(
        [{"text": text} for text in texts], [{"text": nearly}], objective="text", max_seq_length=64
    )
    assert (prepared.train.chats, prepared.held_out.chats, prepared.not_compared) == (10, 1, 0)
    kinds = {finding.kind.value: finding for finding in prepared.findings}
    assert set(kinds) == {"near_duplicates_of_text", "leaks_of_text"}
    assert "chats.jsonl:10 is nearly" in kinds["near_duplicates_of_text"].locations[0]
    assert "held_out.jsonl:1 is nearly" in kinds["leaks_of_text"].locations[0]
    report_documents(prepared, reporter)
    assert "training documents that are nearly the same as an earlier one: 1" in capsys.readouterr().out
