"""A run with a tiny model that has learned something, so that losses on the way to the GGUF are measurable."""

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
from kolotune.fidelity import measure_gguf, measure_models
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.stages import compare

_COLOURS = ("red", "blue", "green", "black", "white", "brown")
_THINGS = ("boat", "house", "lamp", "door", "hat", "cup", "coat", "road")


def chats(tuned: bool) -> list[list[dict[str, str]]]:
    """Return short chats, every other one with a system turn; base and tuned model answer differently."""
    conversations = []
    for number in range(len(_COLOURS) * len(_THINGS)):
        colour, thing = _COLOURS[number % len(_COLOURS)], _THINGS[number // len(_COLOURS)]
        answer = f"Aye, the {thing} is {colour}." if tuned else f"I can see that it is {colour}"
        turns = [
            {"role": "user", "content": f"Here is a {colour} {thing}. Which colour?"},
            {"role": "assistant", "content": answer},
        ]
        conversations.append([{"role": "system", "content": f"Look at the {thing}."}, *turns] if number % 2 else turns)
    return conversations


def _train_bases(folders: tuple[Path, Path], source: Path) -> None:
    """Train all weights of a Llama of 2 layers on the base's answers, with the tokenizer in `source`; save it twice."""
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
    """Add the gradients of some chats to those of the model."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(each.ids) for each in batch], batch_first=True)
    labelled = pad([torch.tensor(each.labelled) for each in batch], batch_first=True)[:, 1:]
    rows, columns = labelled.nonzero(as_tuple=True)
    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[rows, columns])
    torch.nn.functional.cross_entropy(logits, ids[rows, columns + 1]).backward()


@pytest.fixture(scope="session")
def learned_bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """A base model, and a different one of the same shape, which was trained for fewer steps."""
    folder = tmp_path_factory.mktemp("learned")
    folders = folder / "base", folder / "other"
    _train_bases(folders, tiny_base)
    return folders


@pytest.fixture(scope="session")
def learned_run(
    tmp_path_factory: pytest.TempPathFactory, learned_bases: tuple[Path, Path], reporter: PlainReporter
) -> Config:
    """The config of a finished run that was not compared; tests must not change its folder."""
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"messages": turns}) + "\n" for turns in chats(True)]
    (folder / "train.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    options = {
        "train_data": folder / "train.jsonl",
        "eval_data": folder / "held_out.jsonl",
        "base_model": str(learned_bases[0]),
        "output_dir": folder / "run",
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
    config = configs.resolve((options, "test", folder))
    run_pipeline(config, reporter)
    return config


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, which has loaded PyTorch already."""

    def measure(run: RunFolder, kind: str, file: Path, reporter: Any, **env: str) -> None:
        del run, reporter, env
        (measure_models if kind == "models" else measure_gguf).measure(file)

    monkeypatch.setattr(compare, "_run_task", measure)
    monkeypatch.setattr(compare, "_TOGETHER", 1)  # llama.cpp initializes itself once in a process, in one thread
