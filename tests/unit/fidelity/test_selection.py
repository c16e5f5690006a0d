"""Chats whose answers are sequences of their own are compared whole."""

from __future__ import annotations

import dataclasses
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import branching_chats, write_tokens

from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.tokens.encoded_chat import EncodedChat
from kolotune.fidelity import base_figures
from kolotune.fidelity.log_probabilities import loss_of
from kolotune.fidelity.selection import _is_same, select
from kolotune.fidelity.tasks import ComparedChat, ModelsTask
from kolotune.fidelity.trained_format import TrainedFormat
from kolotune.foundation import config as configs
from kolotune.run_folder.layout import TRAIN_TOKENS


def task_of(tokens: Path, most_chats: int, most_tokens: int) -> ModelsTask:
    return ModelsTask("", "", "", "", "", str(tokens), "", [], most_chats, most_tokens, [], "", 0, 0, "", False)


@pytest.mark.parametrize(("most_chats", "most_tokens", "expected"), [(9, 9000, 5), (2, 9000, 2), (9, 1, 1)])
def test_each_sequence_of_a_chat_is_compared(
    most_chats: int, most_tokens: int, expected: int, tiny_base: Path, tmp_path: Path
) -> None:
    chats = branching_chats(5, 3)
    write_tokens(tmp_path / "tokens", chats)
    selection = select(task_of(tmp_path / "tokens", most_chats, most_tokens), TrainedFormat.load(tiny_base))
    sequences = [each for chat in chats[:expected] for each in chat]
    assert len(sequences) > expected
    assert [chat.ids for chat in selection.chats] == [ids for ids, _ in sequences]
    assert [len(chat.positions) for chat in selection.chats] == [sum(mask) for _, mask in sequences]
    assert [len(numbers) for numbers in selection.sequences] == [len(chat) for chat in chats[:expected]]
    assert selection.is_whole == (expected == 5)


@pytest.mark.parametrize(
    ("ids", "labels", "ends", "expected"),
    [
        ([1, 2, 3, 1, 4, 5, 6], [0, 0, 1, 0, 0, 1, 1], (3, 7), True),
        ([1, 2, 3, 1, 4, 5, 7], [0, 0, 1, 0, 0, 1, 1], (3, 7), False),
        ([1, 2, 3, 1, 4, 5, 6], [0, 1, 1, 0, 0, 1, 1], (3, 7), False),
        ([1, 2, 3, 1, 4, 5, 6], [0, 0, 1, 0, 0, 1, 1], (4, 7), False),
        ([1, 2, 3, 1, 4, 5, 6], [0, 0, 1, 0, 0, 1, 1], (), False),
    ],
)
def test_a_chat_is_the_same_if_all_its_sequences_are(
    ids: list[int], labels: list[int], ends: tuple[int, ...], expected: bool
) -> None:
    compared = [ComparedChat([1, 2, 3], [1], []), ComparedChat([1, 4, 5, 6], [1, 2], [])]
    encoded = EncodedChat(array("i", ids).tobytes(), bytes(labels), ends=ends)
    assert _is_same(compared, encoded) == expected


@pytest.mark.parametrize(("choice", "weights"), [("last", [1, 1]), ("all", [0, 1]), ("all", [1, 0]), ("all", [1, 1])])
def test_only_the_prompts_of_trained_answers_must_be_in_the_tokens(
    choice: str, weights: list[int], tiny_base: Path, tmp_path: Path
) -> None:
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate("qarb")
    ]
    turns[1]["weight"], turns[3]["weight"] = weights
    file, values = tmp_path / "chats.jsonl", {"eval_split": 0.0, "train_on": choice}
    file.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    config = configs.resolve(({"train_data": [file], **values}, "test", tmp_path))
    prepare_chats(config, tiny_base, tmp_path, processes=1)
    task = dataclasses.replace(
        task_of(tmp_path / TRAIN_TOKENS, 9, 9000), train_data=[str(file)], reading=ReadingOptions.of(config)
    )
    selection = select(task, TrainedFormat.load(tiny_base))
    assert selection.defects == [] and selection.reproduced == 1
    assert selection.expected == ["a", "b"]


IGNORES_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, IGNORES_SYSTEM])
def test_a_system_turn_is_asked_for_where_the_template_writes_it(
    template: str | None, tiny_base: Path, tmp_path: Path
) -> None:
    """llama.cpp's server writes it into the first question otherwise, which no chat was trained with."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file, values = tmp_path / "chats.jsonl", {"eval_split": 0.0}
    file.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    if template is not None:
        (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
        values["chat_template"] = tmp_path / "own.jinja"
    config = configs.resolve(({"train_data": [file], **values}, "test", tmp_path))
    prepare_chats(config, tiny_base, tmp_path, processes=1)
    task = dataclasses.replace(
        task_of(tmp_path / TRAIN_TOKENS, 9, 9000), train_data=[str(file)], reading=ReadingOptions.of(config)
    )
    selection = select(task, TrainedFormat.load(tiny_base, template or ""))
    assert len(selection.prompts) == 1
    assert len(selection.probes) == (template is None)


def test_weights_of_labels_weigh_the_compared_loss(tiny_base: Path, tmp_path: Path) -> None:
    """So that it is the loss that training measured, which the gate holds it to."""
    chats = [([5, 6, 7, 8], [0, 0.5, 1, 0.25]), ([5, 9, 7], [0, 1, 1])]
    write_tokens(tmp_path / "tokens", chats)
    first, second = select(task_of(tmp_path / "tokens", 9, 9000), TrainedFormat.load(tiny_base)).chats
    assert (first.weights, first.weight, second.weights, second.weight) == ([0.5, 1, 0.25], 1.75, [1, 1], 2)
    logs = np.log(np.random.default_rng(1).dirichlet(np.ones(16), 3)).astype(np.float32)
    expected = -(0.5 * logs[0, 6] + logs[1, 7] + 0.25 * logs[2, 8])
    assert loss_of(logs, first) == pytest.approx(float(expected), rel=1e-6)
    plain = dataclasses.replace(first, weights=None)
    assert loss_of(logs, plain) == pytest.approx(-float(logs[[0, 1, 2], [6, 7, 8]].sum()), rel=1e-6)
    assert plain.weight == 3
    assert base_figures.figures_file("", [plain], [], 0, 0) != base_figures.figures_file("", [first], [], 0, 0)


def test_without_weights_each_label_counts_in_full(tiny_base: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [([5, 6, 7], [0, 1, 1])])
    (chat,) = select(task_of(tmp_path / "tokens", 9, 9000), TrainedFormat.load(tiny_base)).chats
    assert (chat.weights, chat.weight) == (None, 2)
