"""From files of chats to counted tokens, with SmolLM2's real tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from kolotune.base_models import packaged_model
from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.dataset.prepared import AffectedChats, Prepared, SplitCounts, nothing_to_train_on, require_good
from kolotune.chats.dataset.row_store import first_encoded
from kolotune.chats.reading.files import read_chats
from kolotune.chats.tokens.encoder import Encoder
from kolotune.foundation import config as configs
from kolotune.foundation.errors import DataError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.runners import local

Preparer = Callable[..., Prepared]


@pytest.fixture(scope="session")
def base(reporter: PlainReporter) -> Path:
    return packaged_model.unpack(reporter)


@pytest.fixture
def prepare(base: Path, tmp_path: Path) -> Preparer:
    def call(chats: list[list[tuple[str, str]]], held_out: list[list[tuple[str, str]]] = [], **more: Any) -> Prepared:  # noqa: B006
        values = {"train_data": [write(tmp_path / "chats.jsonl", chats)], **more}
        if held_out:
            values["eval_data"] = [write(tmp_path / "held_out.jsonl", held_out)]
        return prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path), processes=1)

    return call


def new_folder(tmp_path: Path) -> Path:
    """Return an empty folder for the prepared files: ``prepared`` in `tmp_path`."""
    shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
    (tmp_path / "prepared").mkdir()
    return tmp_path / "prepared"


def encoded(file: Path) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each chat in a prepared file, and those of them that are labelled."""
    tokens = load_file(file)
    spans = list(pairwise(tokens["offsets"].tolist()))
    ids = [tokens["ids"][start:end] for start, end in spans]
    return [
        (each.tolist(), each[tokens["labelled"][start:end] == 1].tolist())
        for each, (start, end) in zip(ids, spans, strict=True)
    ]


def write(path: Path, chats: list[list[tuple[str, str]]]) -> Path:
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) for chat in chats]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(number: int, answer: str = "Yes.") -> list[tuple[str, str]]:
    return [("user", f"Question {number}?"), ("assistant", f"{answer} {number}")]


def test_too_long_chats_lose_whole_turns_and_never_half_an_answer(prepare: Preparer, tmp_path: Path) -> None:
    long = [*chat(1), *chat(2, "word " * 60), *chat(3)]
    prepared = prepare([long, chat(4), chat(5, "word " * 100)], max_seq_length=64, eval_split=0)
    assert prepared.train.chats == 2
    assert prepared.shortened == AffectedChats(1, (f"{tmp_path / 'chats.jsonl'}:1: 4 turns",))
    assert prepared.dropped_turns == 4
    assert prepared.too_long == AffectedChats(1, (f"{tmp_path / 'chats.jsonl'}:3",))
    for ids, labelled in encoded(tmp_path / "prepared" / TRAIN_TOKENS):
        text = prepared.tokenizer.decode(labelled)
        assert text.startswith("Yes.") and text.endswith("<|im_end|>")
        assert len(ids) <= 64


def test_counts_add_up(prepare: Preparer, tmp_path: Path) -> None:
    prepared = prepare([chat(number) for number in [*range(40), 3, 7]])
    facts = prepared.summary()
    assert facts["duplicates"] == 2
    assert facts["chats"] + facts["held_out_chats"] == 40
    assert facts["held_out_chats"] >= 1
    lengths = [len(ids) for ids, _ in encoded(tmp_path / "prepared" / TRAIN_TOKENS)]
    assert facts["tokens"] == sum(lengths)
    assert (facts["shortest"], facts["longest"]) == (min(lengths), max(lengths))
    assert 0 < facts["labelled_tokens"] < facts["tokens"]
    assert facts["labelled_tokens"] == sum(len(each) for _, each in encoded(tmp_path / "prepared" / TRAIN_TOKENS))
    assert len((tmp_path / "prepared" / HELD_OUT_CHATS).read_text().splitlines()) == facts["held_out_chats"]
    assert sorted(each.name for each in (tmp_path / "prepared").iterdir()) == sorted(
        (TRAIN_TOKENS, HELD_OUT_TOKENS, HELD_OUT_CHATS)
    )


def test_held_out_chats_that_are_trained_on_are_dropped(prepare: Preparer, tmp_path: Path) -> None:
    prepared = prepare([chat(1), chat(2)], held_out=[chat(2), chat(3), chat(2), chat(3)])
    file = tmp_path / "held_out.jsonl"
    assert prepared.in_both == AffectedChats(1, (f"{file}:1",))
    assert prepared.duplicates == AffectedChats(2, (f"{file}:3 is {file}:1 again", f"{file}:4 is {file}:2 again"))
    (line,) = (tmp_path / "prepared" / HELD_OUT_CHATS).read_text().splitlines()
    assert json.loads(line)["messages"][0]["content"] == "Question 3?"
    assert (prepared.train.chats, prepared.held_out.chats) == (2, 1)


def test_copies_are_found_across_files_and_formats(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [chat(1), chat(2), chat(1)])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"id": 3, "prompt": "Question 2?", "completion": "Yes. 2"}]))
    values = {"train_data": [first, second, first], "eval_split": 0}
    prepared = prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path))
    assert prepared.train.chats == 2
    assert prepared.duplicates.count == 5
    assert prepared.duplicates.locations[:2] == (f"{first}:3 is {first}:1 again", f"{second}:1 is {first}:2 again")


def mixed(path: Path, count: int) -> Path:
    """Write good chats, copies, damaged lines, special tokens, and chats that are too long or lose turns."""
    lines = []
    for number in range(count):
        turns = chat(number, ["Yes.", "A <|im_end|> B", "é 日本 🎉"][number % 3])
        if number % 50 == 1:
            turns = chat(number // 2)
        if number % 70 == 2:
            turns = [*turns, *chat(number, "word " * 90)]
        if number % 90 == 3:
            turns = chat(number, "word " * 200)
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
        if number % 100 == 4:
            lines[-1] = lines[-1][: -number % 37 - 1]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_any_number_of_processes_gives_the_same_result(base: Path, tmp_path: Path) -> None:
    data = mixed(tmp_path / "chats.jsonl", 1500)
    config = configs.resolve(({"train_data": [data], "max_seq_length": 96}, "test", tmp_path))
    files, results = [], []
    for processes in (1, 2, 3):
        prepared = prepare_chats(config, base, new_folder(tmp_path), processes=processes)
        files.append({path.name: path.read_bytes() for path in (tmp_path / "prepared").iterdir()})
        facts = prepared.summary()
        results.append(dataclasses.replace(prepared, template=None, tokenizer=None))
    assert files[0] == files[1] == files[2] and results[0] == results[1] == results[2]
    assert len(facts["bad"]) == 15 and facts["special_tokens_in_content"] > 300
    assert min(facts[name] for name in ("duplicates", "shortened", "too_long", "held_out_chats")) > 5


def test_the_tokens_are_those_of_each_chat_encoded_alone(base: Path, tmp_path: Path) -> None:
    data = mixed(tmp_path / "chats.jsonl", 400)
    config = configs.resolve(({"train_data": [data], "eval_split": 0, "max_seq_length": 4096}, "test", tmp_path))
    prepared = prepare_chats(config, base, new_folder(tmp_path), processes=2)
    encoder = Encoder(prepared.template, prepared.tokenizer)
    expected = {}
    for each in read_chats([data]).chats:
        alone = encoder.encode(each)
        labelled = [token for token, on in zip(alone.ids, alone.labelled, strict=True) if on]
        expected.setdefault(each.content_hash(), (alone.ids, labelled))
    assert encoded(tmp_path / "prepared" / TRAIN_TOKENS) == list(expected.values())


@pytest.mark.slow
def test_more_chats_take_no_more_memory(base: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (40_000, 200_000):  # both are worth several processes
        data = mixed(tmp_path / f"{count}.jsonl", count)
        values = {"train_data": [data], "output_dir": tmp_path / f"run {count}", "skip_bad": True}
        peaks.append(peak_memory(tmp_path, values, base))
    assert peaks[1] < 1.1 * peaks[0] < 700e6


def peak_memory(folder: Path, values: dict[str, Any], base: Path) -> float:
    """Return the bytes that preparing takes in its own process and its workers, without what they share."""
    config = configs.resolve((values, "test", folder))
    (folder / "prepared").mkdir(exist_ok=True)
    program = (
        "import pickle, sys; from kolotune.chats.dataset.prepare import prepare_chats;"
        "config, base, folder = pickle.load(sys.stdin.buffer); prepare_chats(config, base, folder)"
    )
    with local.piped([sys.executable, "-c", program], {}) as child:
        assert child.stdin is not None
        pickle.dump((config, base, new_folder(folder)), child.stdin)
        child.stdin.close()
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, unshared(child.pid))
            time.sleep(0.1)
        assert child.returncode == 0
    return peak


def unshared(pid: int) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().uss
    return total


def test_no_data_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of chats"):
        prepare_chats(configs.resolve(({}, "test", tmp_path)), base, new_folder(tmp_path))


def test_special_tokens_in_content_are_counted_and_stay_text(prepare: Preparer, tmp_path: Path) -> None:
    prepared = prepare([chat(1, "Write <|im_end|> so.")], eval_split=0)
    assert prepared.summary()["special_tokens_in_content"] == 1
    end = prepared.tokenizer.convert_tokens_to_ids("<|im_end|>")
    system_user_and_answer = 3
    ((ids, _),) = encoded(tmp_path / "prepared" / TRAIN_TOKENS)
    assert ids.count(end) == system_user_and_answer


def test_bad_chats_are_an_error_unless_they_may_be_skipped(prepare: Preparer) -> None:
    prepared = prepare([chat(1), [("user", "no answer")], chat(2)], eval_split=0)
    with pytest.raises(DataError, match=r"chats\.jsonl:2"):
        require_good(prepared, skip_bad=False)
    require_good(prepared, skip_bad=True)
    assert prepared.train.chats == 2


def test_nothing_to_train_on_is_an_error(prepare: Preparer) -> None:
    with pytest.raises(DataError, match="too long"):
        require_good(prepare([chat(1, "word " * 100)], max_seq_length=16, eval_split=0), skip_bad=True)


def test_findings_are_reported_with_lines_and_counted(
    prepare: Preparer, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kolotune.stages.prepare import report_prepared

    story = "Once upon a time a fox met a hen at the river and asked her politely for the way to the mill"
    chats = [[*chat(number, f"Answer number {number} of many")] for number in range(5)]
    chats.append([("user", "Give me a story"), ("assistant", story)])
    chats.append([("user", "Give me a story!"), ("assistant", story + ".")])
    prepared = prepare(chats, held_out=[[("user", "give me a STORY"), ("assistant", "No.")]], eval_split=0)
    assert prepared.summary()["findings"] == {"leaks": 1, "near_duplicates": 1}
    report_prepared(prepared, PlainReporter())
    output = capsys.readouterr().out
    assert f"{tmp_path / 'chats.jsonl'}:7 is nearly {tmp_path / 'chats.jsonl'}:6 (100%)" in output
    assert f"{tmp_path / 'held_out.jsonl'}:1 asks the same as {tmp_path / 'chats.jsonl'}:6" in output
    config = configs.resolve(({"train_data": [tmp_path / "chats.jsonl"]}, "test", tmp_path))
    few = prepare_chats(config, base, new_folder(tmp_path), compared=3)
    assert few.summary()["not_compared"] == 4
    report_prepared(few, PlainReporter())
    assert "4 chats were not" in capsys.readouterr().out


# Opens a thought, drops earlier ones, and writes an empty one in the last answer.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def thinking(base: Path, tmp_path: Path) -> Preparer:
    """Prepare chats with reasoning, given as (question, answer, reasoning or None), with `THINKING`."""
    (tmp_path / "thinking.jinja").write_text(THINKING)

    def call(chats: list[list[tuple[str, str, str | None]]], **more: Any) -> Prepared:
        lines = []
        for turns in chats:
            messages: list[dict[str, str]] = []
            for question, answer, thought in turns:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
                messages[-1] |= {"reasoning_content": thought} if thought is not None else {}
            lines.append(json.dumps({"messages": messages}) + "\n")
        (tmp_path / "chats.jsonl").write_text("".join(lines))
        values = {"train_data": [tmp_path / "chats.jsonl"], "chat_template": tmp_path / "thinking.jinja", **more}
        return prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path), processes=1)

    return call


def test_answers_apart_are_counted_and_written_in_order(thinking: Preparer, tmp_path: Path) -> None:
    chats = [
        [("Hi", "Hello", "They greet."), ("Why?", "So.", None), ("And?", "No.", "Hm.")],
        [("Hi", "Ho", None)],
        [("A?", "B.", None), ("C?", "D.", None)],
    ]
    prepared = thinking(chats, eval_split=0)
    facts = prepared.summary()
    assert (facts["apart_opening"], facts["apart_history"], facts["apart_boundary"]) == (0, 2, 0)
    assert (facts["masked_thoughts"], facts["dropped_thoughts"]) == (4, 1)
    file = tmp_path / "prepared" / TRAIN_TOKENS
    assert load_file(file)["chats"].tolist() == [0, 3, 4, 6]
    learned = [prepared.tokenizer.decode(labelled) for _, labelled in encoded(file)]
    thoughts = ["They greet.\n</think>\n\nHello", "So.", "Hm.\n</think>\n\nNo.", "Ho", "B.", "D."]
    assert learned == [f"{text}<|im_end|>" for text in thoughts]
    lengths = [len(ids) for ids, _ in encoded(file)]
    assert facts["tokens"] == sum(lengths) and (facts["shortest"], facts["longest"]) == (min(lengths), max(lengths))
    encoder = Encoder(prepared.template, prepared.tokenizer)
    chat_of_three, *_ = read_chats([tmp_path / "chats.jsonl"]).chats
    for index, (ids, labelled) in zip((1, 3, 5), encoded(file), strict=False):
        prompt = encoder.prompt_ids(chat_of_three.message_dicts()[:index])
        assert ids[: len(prompt)] == prompt and ids[-len(labelled) :] == labelled
    assert [ids for ids, _ in first_encoded(file)] == [ids for ids, _ in encoded(file)][:3]
    learning = thinking(chats, eval_split=0, empty_thoughts="learn").summary()
    assert learning["masked_thoughts"] == 0 and learning["tokens"] == facts["tokens"]
    assert learning["labelled_tokens"] > facts["labelled_tokens"]


def test_each_sequence_fits_and_a_chat_loses_its_last_turns(thinking: Preparer, tmp_path: Path) -> None:
    long = "word " * 60
    chats = [
        [("Hi", "Hello", None), ("Why?", "So.", long), ("And?", "No.", None)],  # the second sequence is too long
        [("Hi", "Ho", None), ("Why?", long, None), ("And?", "Yes.", None)],  # the second and the third
        [(str(number), "Yes.", None) for number in range(3)],  # all together, but none alone
        [(long, "Ho", None)],
    ]
    prepared = thinking(chats, eval_split=0, max_seq_length=64)
    assert prepared.train.chats == 3
    name = tmp_path / "chats.jsonl"
    assert prepared.shortened == AffectedChats(2, (f"{name}:1: 4 turns", f"{name}:2: 4 turns"))
    assert prepared.too_long == AffectedChats(1, (f"{name}:4",))
    sequences = encoded(tmp_path / "prepared" / TRAIN_TOKENS)
    assert (
        max(len(ids) for ids, _ in sequences) == prepared.lengths[2] <= 64 < sum(len(ids) for ids, _ in sequences[2:])
    )
    assert [prepared.tokenizer.decode(labelled) for _, labelled in sequences] == [
        "Hello<|im_end|>", "Ho<|im_end|>", *["Yes.<|im_end|>"] * 3
    ]  # fmt: skip


def test_what_is_done_for_serving_is_reported(thinking: Preparer, capsys: pytest.CaptureFixture[str]) -> None:
    from kolotune.stages.prepare import report_prepared

    chats = [[("Hi", "Hello", "They greet."), ("Why?", "So.", None)]]
    report_prepared(thinking(chats, eval_split=0), PlainReporter())
    output = capsys.readouterr().out
    assert "1 chats are trained with a sequence for each answer: the template writes earlier" in output
    assert "1 answers have no thought" in output and "1 thoughts are left out of later prompts" in output


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def prepared_of(records: list[Any], base: Path, tmp_path: Path, **more: Any) -> Prepared:
    values = {"train_data": [write_records(tmp_path / "records.jsonl", records)], "eval_split": 0, **more}
    return prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path), processes=1)


def test_excluded_answers_have_no_labels_and_are_counted(base: Path, tmp_path: Path) -> None:
    def turns(number: int) -> list[dict[str, Any]]:
        texts = ["q", f"first {number}", "r", f"second {number}"]
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]

    masked, excluded = turns(1), turns(2)
    masked[1]["weight"] = 0
    excluded[1]["train"] = excluded[3]["train"] = False
    prepared = prepared_of([{"messages": each} for each in (masked, excluded, turns(3))], base, tmp_path)
    facts = prepared.summary()
    assert (facts["chats"], facts["excluded"], facts["untrained_turns"]) == (2, 1, 1)
    trained = [prepared.tokenizer.decode(labelled) for _, labelled in encoded(tmp_path / "prepared" / TRAIN_TOKENS)]
    assert trained == ["second 1<|im_end|>", "first 3<|im_end|>second 3<|im_end|>"]


@pytest.mark.parametrize(
    ("choice", "trained", "counts"),
    [
        ("all", ["one 1<|im_end|>two 1<|im_end|>", "one 2<|im_end|>two 2<|im_end|>", "one 3<|im_end|>"], (3, 0, 1)),
        ("last", ["two 1<|im_end|>", "two 2<|im_end|>"], (2, 1, 2)),
        ("flagged", ["two 2<|im_end|>"], (1, 2, 1)),
    ],
)
def test_which_answers_count(
    choice: str, trained: list[str], counts: tuple[int, int, int], base: Path, tmp_path: Path
) -> None:
    records = []
    for number, weight in enumerate([None, 1, 0], 1):
        texts = ["q", f"one {number}", "r", f"two {number}"]
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
        records.append({"messages": [*turns[:3], {**turns[3], "weight": weight}]})
    prepared = prepared_of(records, base, tmp_path, train_on=choice)
    found = [prepared.tokenizer.decode(labelled) for _, labelled in encoded(tmp_path / "prepared" / TRAIN_TOKENS)]
    assert found == trained
    facts = prepared.summary()
    assert (facts["chats"], facts["excluded"], facts["untrained_turns"]) == counts


@pytest.mark.parametrize("choice", ["last", "flagged"])
def test_held_out_chats_are_read_again_as_they_were_read(choice: str, base: Path, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "second")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[3] |= {"weight": 1}
    other = [*messages[:2], {"role": "user", "content": "s"}, messages[3]]
    held_out = write_records(tmp_path / "held_out.jsonl", [{"messages": other}])
    values = {"train_data": [write_records(tmp_path / "records.jsonl", [{"messages": messages}])], "train_on": choice}
    given = configs.resolve(({**values, "eval_data": [held_out]}, "test", tmp_path))
    prepare_chats(given, base, new_folder(tmp_path), processes=1)
    (chat,) = read_chats([tmp_path / "prepared" / HELD_OUT_CHATS]).chats
    assert [message.is_trained for message in chat.messages] == [True, False, True, True]


def test_nothing_flagged_is_an_error_that_names_the_option(base: Path, tmp_path: Path) -> None:
    prepared = prepared_of([{"question": "q", "answer": "a"}], base, tmp_path, train_on="flagged")
    with pytest.raises(DataError, match=r"1 are excluded .* --train-on"):
        require_good(prepared, skip_bad=False)


def test_excluded_answers_stay_excluded_in_held_out_chats(base: Path, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "second")]
    messages = [{"role": role, "content": text} for role, text in turns]
    held_out = write_records(tmp_path / "held_out.jsonl", [{"messages": messages, "loss_mask": [0, 0, 0, 1]}])
    values = {"train_data": [write(tmp_path / "chats.jsonl", [chat(1)])], "eval_data": [held_out]}
    prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path), processes=1)
    (first,), (second,) = read_chats([held_out]).chats, read_chats([tmp_path / "prepared" / HELD_OUT_CHATS]).chats
    assert first == second
    assert [message.is_trained for message in second.messages] == [True, False, True, True]


def test_records_that_differ_in_what_is_not_read_are_no_copies(base: Path, tmp_path: Path) -> None:
    records = [
        {"question": "q", "answer": "a", "passage": "one", "id": 1},
        {"question": "q", "answer": "a", "passage": "two", "id": 2},
        {"question": "q", "answer": "a", "passage": "two", "id": 3},
        {"question": "q", "answer": "a", "context": "three", "passage": None},
    ]
    prepared = prepared_of(records, base, tmp_path)
    assert (prepared.train.chats, prepared.duplicates.count) == (3, 1)
    assert prepared.summary()["unread_keys"] == {"passage": 3, "id": 3}
    read = prepared_of(records, base, tmp_path, map=["context=passage"])
    assert read.train.chats == 3 and read.summary()["unread_keys"] == {"id": 3}
    ignored = prepared_of(records, base, tmp_path, ignore_keys="passage,id")
    assert ignored.train.chats == 2 and ignored.summary()["unread_keys"] == {}


def test_held_out_records_whose_chat_is_trained_on_are_left_out(base: Path, tmp_path: Path) -> None:
    record = {"question": "q", "answer": "a"}
    held_out = write_records(
        tmp_path / "held_out.jsonl", [{**record, "passage": "x"}, {"question": "r", "answer": "b"}]
    )
    values = {"train_data": [write_records(tmp_path / "chats.jsonl", [record])], "eval_data": [held_out]}
    prepared = prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path), processes=1)
    assert (prepared.held_out.chats, prepared.in_both.count) == (1, 1)


def test_problems_are_a_line_for_each_kind(prepare: Preparer) -> None:
    chats = [*map(chat, range(3)), *([*chat(number), ("user", "and?")] for number in range(3, 83)), [("narrator", "x")]]
    prepared = prepare(chats, eval_split=0)
    with pytest.raises(DataError) as caught:
        require_good(prepared, skip_bad=False)
    first, *lines = caught.value.cause.splitlines()
    assert first == "81 problems in the chats:"
    assert len(lines) == 2
    assert "chats.jsonl:4: turn 3: the last turn is the user's" in lines[0]
    assert lines[0].endswith("(80 of this kind; the next in 5, 6, 7, …)")
    assert 'unknown role "narrator"' in lines[1]
    assert "--fix-turns" in caught.value.hint and "81 chats with --skip-bad" in caught.value.hint
    fixed = prepare(chats, eval_split=0, fix_turns=True)
    assert len(fixed.problems) == 1 and fixed.train.chats == 83
    assert fixed.summary()["turn_fixes"] == {"last_turn": 80}


def test_what_was_read_and_what_was_not_is_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kolotune.stages.prepare import report_prepared

    messages = [{"role": "user", "content": "q", "name": "ann"}, {"role": "assistant", "content": "a"}]
    prepared = prepared_of([{"messages": messages, "notes": "x", "id": 1}], base, tmp_path)
    report_prepared(prepared, PlainReporter())
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "'notes' is filled in 1 record and not read; --map context=notes reads it" in shown
    assert "'name' is filled in turns of 1 record and not read; --ignore-keys name" in shown
    assert "'id' is filled in 1 record and not read; it seems to describe the record" in shown


@pytest.mark.parametrize(("count", "words"), [(1, "1 chat is few"), (3, "3 chats are few"), (20, "")])
def test_few_chats_are_named(count: int, words: str, prepare: Preparer, capsys: pytest.CaptureFixture[str]) -> None:
    from kolotune.stages.prepare import report_prepared

    report_prepared(prepare([chat(number) for number in range(count)], eval_split=0), PlainReporter())
    shown = " ".join("".join(capsys.readouterr()).split())
    assert words in shown and ("the model will repeat them" in shown) == bool(words)


def composing(base: Path, folder: Path) -> Path:
    """Return a copy of a base whose tokenizer composes letters, as that of Qwen 2 does."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    return folder


def test_letters_apart_from_their_accents_are_counted_and_trained_as_written(base: Path, tmp_path: Path) -> None:
    pairs = [("Zürich?", "Ja."), ("Zu\u0308rich?", "Ja."), ("Genf?", "Gene\u0300ve."), ("Bern?", "Ja.")]
    file = write(tmp_path / "c.jsonl", [[("user", question), ("assistant", answer)] for question, answer in pairs])
    values = {"train_data": [file], "eval_split": 0.0}
    prepared = prepare_chats(
        configs.resolve((values, "test", tmp_path)), composing(base, tmp_path / "base"), new_folder(tmp_path)
    )
    assert prepared.as_served.count == prepared.summary()["as_written"] == 2 and not prepared.summary()["more_spaces"]
    assert prepared.as_served.locations == (f"{file}:2", f"{file}:3")
    texts = [prepared.tokenizer.decode(ids) for ids, _ in encoded(tmp_path / "prepared" / TRAIN_TOKENS)]
    assert [question in text and answer in text for (question, answer), text in zip(pairs, texts, strict=True)]
    plain = prepare_chats(configs.resolve((values, "test", tmp_path)), base, new_folder(tmp_path))
    assert plain.replaced is None and not plain.as_served.count


def test_records_on_one_line_are_chats_of_their_own(base: Path, tmp_path: Path) -> None:
    """A JSON array without line breaks, as json.dump writes it: all of its records have one line."""
    lines = write(tmp_path / "c.jsonl", [chat(number) for number in range(40)]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "c.json").write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    counts = []
    for name in ("c.jsonl", "c.json"):
        config = configs.resolve(({"train_data": [tmp_path / name], "eval_split": 0.1}, "test", tmp_path))
        prepared = prepare_chats(config, base, new_folder(tmp_path))
        counts.append((prepared.train, prepared.held_out))
    assert counts[0] == counts[1] and counts[0][1].chats < 10


def test_chats_that_are_all_held_out_are_called_that(prepare: Preparer) -> None:
    prepared = prepare([chat(number) for number in range(20)])
    prepared.train, prepared.held_out = SplitCounts(), SplitCounts(chats=20)
    error = nothing_to_train_on(prepared)
    assert "20 are held out" in error.cause and "--eval-split" in error.hint
