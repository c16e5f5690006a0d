"""Every artifact of a run, damaged 500 times over: caught each time before it is used, by a hash or a parser."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.fake_stage import FakeStage

from kolotune.engines.native import checkpointer
from kolotune.engines.native.checkpointer import TrainingState
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.hashing import Hasher
from kolotune.gguf import header
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.reasons import Reason, ReasonKind, find_reasons
from kolotune.run_folder.records import now, read_record, write_record
from kolotune.run_folder.stage import Context
from kolotune.weights.adapter import read_adapter
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.weight_files import weight_files

COUNT = 500


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    """`COUNT` damages, no two of them planned alike: flipped bits, other bytes, cuts, holes, and parts moved."""
    dice = random.Random(seed)
    while True:
        kind, at = dice.randrange(6), dice.randrange(len(data))
        length = dice.choice([1, 8, 64, 512])
        if kind == 0:
            found = data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            found = data[:at] + dice.randbytes(length) + data[at + length :]
        elif kind == 2:
            found = data[:at]
        elif kind == 3:
            found = data[:at] + bytes(len(data) - at)
        elif kind == 4:
            found = data[:at] + data[at + length :]
        else:
            found = data[:at] + data[at : at + length] + data[at:]
        if found != data:
            yield found


def _adapter(path: Path) -> None:
    shapes = {"lora_A.weight": (4, 16), "lora_B.weight": (16, 4)}
    save_file(
        {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}": np.ones(shape, np.float32) / 8
            for layer in range(2)
            for name, shape in shapes.items()
        },
        path,
    )


def _gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(80)])
    writer.add_tensor("output.weight", np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens(path: Path) -> None:
    tensors = {"ids": np.arange(90, dtype=np.int32), "labelled": np.ones(90, np.uint8)}
    save_file({"offsets": np.array([0, 40, 90]), **tensors}, path)


def _modelfile(path: Path) -> None:
    said = Modelfile("./Merged.gguf", '{{ .Prompt }}"', "Be kind.", (("stop", "<|im_end|>"),), "MIT")
    path.write_text(render_modelfile(said), encoding="utf-8")


ARTIFACTS: dict[str, Callable[[Path], None]] = {
    "adapter_model.safetensors": _adapter,
    "model.safetensors": lambda path: save_file({"w": np.ones((16, 16), np.float16)}, path),
    "Merged.gguf": _gguf,
    "train.safetensors": _tokens,
    "Modelfile": _modelfile,
    "metrics.jsonl": lambda path: path.write_text('{"step": 1, "loss": 2.5}\n' * 9) and None,
}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    run = RunFolder(tmp_path / "run")
    run.state.mkdir(parents=True)
    return Context(Config(), run, tmp_path)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_damaged_artifact_makes_its_stage_run_again(name: str, context: Context) -> None:
    path = context.run.root / name
    ARTIFACTS[name](path)
    whole = path.read_bytes()
    made, used = FakeStage(made=[path]), FakeStage(NAME="next", files={"what was made": path})
    for stage in (made, used):
        write_record(stage, context, {}, now())
        assert find_reasons(stage, context) == []
    for _, data in zip(range(COUNT), damaged(whole, 5), strict=False):
        path.write_bytes(data)
        fresh = dataclasses.replace(context, hasher=Hasher())
        assert find_reasons(made, fresh) == [Reason(ReasonKind.OUTPUT_ALTERED, name)]
        assert find_reasons(used, fresh) == [Reason(ReasonKind.INPUT_CHANGED, "what was made")]


def test_a_damaged_record_is_ignored_or_reads_the_same(context: Context) -> None:
    stage = FakeStage()
    facts = {"final_loss": 2.25, "chats": 12, "adds_bos": False, "name": "é"}
    written = write_record(stage, context, facts, now())
    path = context.run.record("fake")
    whole = path.read_bytes()
    same = 0
    for _, data in zip(range(COUNT), damaged(whole, 6), strict=False):
        path.write_bytes(data)
        found = read_record(context.run, "fake")
        assert found is None or dataclasses.asdict(found) == json.loads(json.dumps(dataclasses.asdict(written)))
        same += found is not None
    assert same < COUNT / 10  # a blank more or less


def test_a_damaged_checkpoint_is_skipped(make_training: Callable[..., Any]) -> None:
    job = make_training().job()
    for step in (4, 8):
        checkpointer.save(job, TrainingState(step, 1.5, 2, {"x": torch.full((16, 4), float(step))}))
    newest = Path(job.checkpoints) / "step-00000008"
    for file in newest.iterdir():
        whole = file.read_bytes()
        for _, data in zip(range(COUNT), damaged(whole, 7), strict=False):
            file.write_bytes(data)
            state = checkpointer.newest(job)
            assert state is not None
            if state.step == 8:  # a blank more or less in its facts
                assert file.suffix == ".json" and json.loads(data) == json.loads(whole)
                assert (state.best_loss, state.evaluations_since_best) == (1.5, 2)
            else:
                assert state.step == 4 and torch.equal(state.tensors["x"], torch.full((16, 4), 4.0))
        file.write_bytes(whole)


def _read_adapter(path: Path) -> Any:
    (path.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    return read_adapter(path.parent)


PARSERS: dict[str, Callable[[Path], Any]] = {
    "adapter_model.safetensors": _read_adapter,
    "model.safetensors": lambda path: MappedTensors(weight_files(path.parent)),
    "Merged.gguf": header.read,
    "Modelfile": lambda path: parse_modelfile(path.read_text(encoding="utf-8", errors="replace")),
}


@pytest.mark.parametrize("name", PARSERS)
def test_without_a_hash_the_parser_refuses_or_reads_but_never_breaks(name: str, tmp_path: Path) -> None:
    """What comes from elsewhere has no hash here; a flipped bit of a weight is then a weight like others."""
    path = tmp_path / name
    ARTIFACTS[name](path)
    whole = path.read_bytes()
    PARSERS[name](path)
    refused = 0
    for number, data in zip(range(COUNT), damaged(whole, 8), strict=False):
        if number % 2:  # the header is where a parser can be hurt
            data = data[:300] + whole[300:]
        path.unlink()  # a file that is mapped must not be cut
        path.write_bytes(data)
        try:
            PARSERS[name](path)
        except KolotuneError as error:
            assert error.cause and error.hint
            refused += 1
    assert refused > COUNT / 10
