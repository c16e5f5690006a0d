"""Pairs and labelled answers on disk: whose sequences are whose, what is left out, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kolotune.base_models import packaged_model
from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.dataset.prepared import Prepared, require_good
from kolotune.chats.dataset.row_store import first_encoded, first_rejected
from kolotune.chats.reading.files import read_chats
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation import config as configs
from kolotune.foundation.errors import DataError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.stages.prepare import report_prepared

Preparer = Callable[..., tuple[Prepared, Path]]


@pytest.fixture(scope="module")
def base(reporter: PlainReporter) -> Path:
    return packaged_model.unpack(reporter)


@pytest.fixture
def prepare(base: Path, tmp_path: Path) -> Preparer:
    def call(records: list[Any], **more: Any) -> tuple[Prepared, Path]:
        file, folder = tmp_path / "pairs.jsonl", tmp_path / f"prepared-{len(list(tmp_path.iterdir()))}"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        folder.mkdir()
        values = {"train_data": [file], "objective": "dpo", "eval_split": 0.0, **more}
        return prepare_chats(configs.resolve((values, "test", tmp_path)), base, folder, processes=1), folder

    return call


def pair(number: int, chosen: str = "It is good, thanks.", rejected: str = "No.") -> dict[str, str]:
    return {"prompt": f"How is number {number}?", "chosen": chosen, "rejected": rejected}


def text(prepared: Prepared, ids: list[int]) -> str:
    return str(prepared.tokenizer.decode(ids))


def test_the_rejected_answer_comes_first_and_both_share_the_prompt(prepare: Preparer) -> None:
    prepared, folder = prepare([pair(number) for number in range(3)])
    tokens = PreparedTokens.load(folder / TRAIN_TOKENS)
    assert len(tokens) == 3 == prepared.pairs and tokens.rejected is not None
    assert tokens.rejected.tolist() == [1, 1, 1]
    for chat in range(3):
        (rejected, labels), (chosen, other_labels) = map(tokens.sequence, tokens.sequences(chat))
        assert text(prepared, rejected[labels >= 0].tolist()) == "No.<|im_end|>"
        assert text(prepared, chosen[other_labels >= 0].tolist()) == "It is good, thanks.<|im_end|>"
        start = int((labels < 0).int().argmin())
        assert rejected[:start].tolist() == chosen[:start].tolist()
        assert list(tokens.preferred_sequences(chat)) == [2 * chat + 1]
        shared = start - 1  # all of the prompt but its last token, which predicts the first of both answers
        assert tokens.chat_length(chat) == len(rejected) + len(chosen) - shared, "the prompt counts once"
    file = folder / TRAIN_TOKENS
    assert (len(first_encoded(file)), first_rejected(file)) == (2, 1)


def test_only_what_follows_the_prompt_is_trained_on(prepare: Preparer) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]
    turns.append({"role": "user", "content": "q"})
    sides = {"chosen": [*turns, {"role": "assistant", "content": "new"}]}
    sides["rejected"] = [*turns, {"role": "assistant", "content": "bad"}]
    prepared, folder = prepare([sides])
    (rejected, labels), (chosen, other_labels) = map(PreparedTokens.load(folder / TRAIN_TOKENS).sequence, (0, 1))
    assert text(prepared, rejected[labels >= 0].tolist()) == "bad<|im_end|>"
    assert text(prepared, chosen[other_labels >= 0].tolist()) == "new<|im_end|>"
    assert (prepared.untrained_turns, prepared.excluded) == (0, 0)


def test_equal_answers_are_named_and_left_out(prepare: Preparer) -> None:
    prepared, folder = prepare([pair(0), pair(1, "same", "same"), pair(2)])
    assert (prepared.undecided.count, prepared.pairs, prepared.problems) == (1, 2, [])
    assert prepared.undecided.locations[0].endswith("pairs.jsonl:2")
    assert len(PreparedTokens.load(folder / TRAIN_TOKENS)) == 2
    require_good(prepared, skip_bad=False)
    only, _ = prepare([pair(1, "same", "same")])
    with pytest.raises(DataError, match="same answer twice"):
        require_good(only, skip_bad=False)


def test_pairs_that_are_too_long_are_left_out_whole(prepare: Preparer) -> None:
    prepared, folder = prepare([pair(0), pair(1, "word " * 80), pair(2, rejected="word " * 80)], max_seq_length=64)
    assert (prepared.too_long.count, prepared.shortened.count) == (2, 0)
    assert len(PreparedTokens.load(folder / TRAIN_TOKENS)) == 1


def test_copies_are_of_both_answers(prepare: Preparer) -> None:
    prepared, _ = prepare([pair(0), pair(0), pair(0, rejected="Never."), pair(0, "No.", "It is good, thanks.")])
    assert (prepared.duplicates.count, prepared.pairs) == (1, 3)


def test_held_out_pairs_keep_their_chosen_chats_for_comparing(prepare: Preparer) -> None:
    """Each record is read as the preferred chat, also where two pairs have the same one."""
    records = [pair(number // 2, rejected=f"No, {number}.") for number in range(80)]
    prepared, folder = prepare(records, eval_split=0.3)
    held_out = PreparedTokens.load(folder / HELD_OUT_TOKENS)
    chats = read_chats([folder / HELD_OUT_CHATS]).chats
    assert len(chats) == len(held_out) == prepared.held_out.chats > 10
    assert prepared.train.chats + prepared.held_out.chats == 80
    for index, chat in enumerate(chats):
        (number,) = held_out.preferred_sequences(index)
        ids, labels = held_out.sequence(number)
        assert text(prepared, ids[labels >= 0].tolist()) == f"{chat.messages[-1].content}<|im_end|>"
    again, _ = prepare([*records, pair(1000)], eval_split=0.3)
    assert again.held_out.chats in (prepared.held_out.chats, prepared.held_out.chats + 1), "other pairs stay"


def test_labelled_answers_and_pairs_for_kto(prepare: Preparer) -> None:
    rated = [{"prompt": f"q{number}", "completion": "a b c", "label": number % 2 == 0} for number in range(4)]
    prepared, folder = prepare([*rated, pair(9)], objective="kto")
    tokens = PreparedTokens.load(folder / TRAIN_TOKENS)
    assert tokens.rejected is not None and tokens.rejected.tolist() == [0, 1, 0, 1, 1]
    assert [len(tokens.sequences(chat)) for chat in range(5)] == [1, 1, 1, 1, 2]
    assert (prepared.pairs, prepared.undesirable) == (1, 2)
    assert prepared.summary()["undesirable"] == 2


def test_answers_that_a_template_makes_the_same_decide_nothing(prepare: Preparer, tmp_path: Path) -> None:
    template = tmp_path / "trims.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    records = [pair(1, "Yes.", "Yes.\n"), pair(2, "Yes.", " Yes"), pair(3)]
    assert prepare(records)[0].undecided.count == 0
    prepared, _ = prepare(records, chat_template=template)
    assert prepared.problems == [] and (prepared.train.chats, prepared.undecided.count) == (2, 1)
    assert prepared.undecided.locations[0].endswith("pairs.jsonl:1")


@pytest.mark.parametrize(("labels", "word"), [((True, True), "good"), ((False, False), "bad"), ((True, False), "")])
def test_labels_that_are_all_the_same_are_reported(
    labels: tuple[bool, bool], word: str, prepare: Preparer, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = [{"prompt": f"q{number}", "completion": "a", "label": label} for number, label in enumerate(labels)]
    report_prepared(prepare(rated, objective="kto")[0], reporter)
    printed = " ".join(capsys.readouterr().out.split())
    assert (f"all answers are labelled as {word}" in printed) == bool(word) and ("all answers" in printed) == bool(word)
    report_prepared(prepare([*rated, {**pair(9), "label": 1}], objective="kto")[0], reporter)
    printed = " ".join(capsys.readouterr().out.split())
    assert "all answers" not in printed and "'label' is filled in 1 record and not read" in printed
    assert "--objective dpo or kto" not in printed, "it is that already"


def test_supervised_chats_have_no_such_table(prepare: Preparer) -> None:
    _, folder = prepare([{"prompt": "q", "completion": "a"}], objective="sft")
    assert "rejected" not in load_file(folder / TRAIN_TOKENS)


def test_tools_and_calls_go_through(prepare: Preparer) -> None:
    """Calls in an answer, with arguments in the form that servers hand on, in both sides."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    openai = {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": tools},
        "preferred_output": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "non_preferred_output": [{"role": "assistant", "content": "I can't."}],
    }
    template = Path(__file__).parents[4] / "examples" / "tools" / "chat_template.jinja"
    prepared, folder = prepare([openai], chat_template=template)
    assert prepared.problems == []
    tokens = PreparedTokens.load(folder / TRAIN_TOKENS)
    ids, labels = tokens.sequence(1)
    assert '"name": "f"' in text(prepared, ids[labels >= 0].tolist())
    assert '"f"' in text(prepared, ids[labels < 0].tolist()), "the definition is in the prompt"
