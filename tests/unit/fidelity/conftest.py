"""A run with a tiny model that has learnt something, so that what is lost on the road can be seen."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_llama

from kolotune.chats import Chat, Message
from kolotune.chats.tokens.encoded_chat import EncodedChat
from kolotune.chats.tokens.encoder import Encoder
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES, chat_template, load_tokenizer, template_text
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline

_COLOURS = ("red", "blue", "green", "black", "white", "brown")
_THINGS = ("boat", "house", "lamp", "door", "hat", "cup", "coat", "road")


def chats(tuned: bool) -> list[list[dict[str, str]]]:
    """Short chats, every other one with a system turn; base and tuned model answer otherwise."""
    made = []
    for number in range(len(_COLOURS) * len(_THINGS)):
        colour, thing = _COLOURS[number % len(_COLOURS)], _THINGS[number // len(_COLOURS)]
        answer = f"Aye, the {thing} is {colour}." if tuned else f"I can see that it is {colour}"
        turns = [
            {"role": "user", "content": f"Here is a {colour} {thing}. Which colour?"},
            {"role": "assistant", "content": answer},
        ]
        made.append([{"role": "system", "content": f"Look at the {thing}."}, *turns] if number % 2 else turns)
    return made


def _train_bases(folders: tuple[Path, Path], source: Path) -> None:
    """A Llama of 2 layers with the tokenizer in `source`, trained as a whole on the base's answers; saved twice."""
    import torch

    model = tiny_llama(seed=0, initializer_range=0.12)
    tokenizer = load_tokenizer(source)
    encoder = Encoder(chat_template(tokenizer, template_text(source)), tokenizer)
    encoded = [encoder.encode(Chat(tuple(Message(**turn) for turn in turns))) for turns in chats(False)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for folder, steps in zip(folders, (20, 5), strict=True):
        for step in range(steps):
            _train_on(model, encoded[step % 4 :: 4])
            optimizer.step()
            optimizer.zero_grad()
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _train_on(model: Any, batch: list[EncodedChat]) -> None:
    """The gradients of some chats, added to those that the model has."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(each.ids) for each in batch], batch_first=True)
    labelled = pad([torch.tensor(each.labelled) for each in batch], batch_first=True)[:, 1:]
    rows, columns = labelled.nonzero(as_tuple=True)
    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[rows, columns])
    torch.nn.functional.cross_entropy(logits, ids[rows, columns + 1]).backward()


@pytest.fixture(scope="session")
def learnt_bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """A base model, and another of the same shape that learnt a little longer."""
    room = tmp_path_factory.mktemp("learnt")
    folders = room / "base", room / "other"
    _train_bases(folders, tiny_base)
    return folders


@pytest.fixture(scope="session")
def learnt(
    tmp_path_factory: pytest.TempPathFactory, learnt_bases: tuple[Path, Path], reporter: PlainReporter
) -> Config:
    """The config of a finished run that was not compared; read its folder only."""
    room = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"messages": turns}) + "\n" for turns in chats(True)]
    (room / "train.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    (room / "held_out.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    options = {
        "train_data": room / "train.jsonl",
        "eval_data": room / "held_out.jsonl",
        "base_model": str(learnt_bases[0]),
        "output_dir": room / "run",
        "epochs": 6,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "checkpoint_steps": 0,
        "dtype": "fp32",
        "compile": "off",
        "template_date": "2026-01-02",
        "system": "Be kind.",
        "compare": False,
        "compare_answers": 2,
    }
    config = configs.resolve((options, "test", room))
    run_pipeline(config, reporter)
    return config
