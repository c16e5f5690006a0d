"""PiSSA and OLoRA: the model starts as the base, trains as in PEFT, and what is saved adds to the original weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.packed_models import chats_of, compare, pair_of
from support.reference_training import plain_training
from support.training import TrainingFolder, branching_chats, random_pairs

from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.trainer import Trainer
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.stages import merge
from kolotune.weights.adapter import read_adapter
from kolotune.weights.model_shape import AdapterShape, read_shape

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
MakeTraining = Callable[..., TrainingFolder]
CHATS: dict[str, Any] = {"chats": branching_chats(9, 1), "held_out": branching_chats(4, 2)}
BOTH = pytest.mark.parametrize("name", ["pissa", "olora"])


def losses(job: TrainJob) -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def merged(job: TrainJob, target: Path) -> dict[str, torch.Tensor]:
    base = Path(job.base_model)
    target.mkdir(exist_ok=True)
    merge.merge_adapter(Path(job.adapter), base, target, tokenizer=base, dtype="fp32", reporter=PlainReporter())
    return weights(target)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "gemma"])  # the packed step, and transformers' model
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rsLoRA", "DoRA"])
def test_a_training_equals_pefts(
    name: str, kind: str, options: dict[str, Any], make_training: MakeTraining, tmp_path: Path
) -> None:
    folder = make_training(kind, **CHATS)
    job = folder.job(batch_size=3, epochs=2, learning_rate=2e-3, init_lora_weights=name, **options)
    training.train(job)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.root / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=name, task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(base, config).train()
    curve = plain_training(job, model)
    assert curve[0] - min(curve) > 0.1, "nothing was learnt, so the comparison proves nothing"
    assert losses(job) == pytest.approx(curve, abs=2e-4)
    found, before = merged(job, tmp_path / "merged"), weights(folder.root / "base")
    for key, wanted in model.merge_and_unload().state_dict().items():
        if key in found:
            change = float((wanted - before[key]).abs().max())
            torch.testing.assert_close(found[key], wanted, atol=max(0.03 * change, 1e-6), rtol=1e-3, msg=key)
    read = read_adapter(Path(job.adapter))
    assert read.config.initial is None and read.config.rank == 8
    scale = 4.0 if options.get("use_rslora") else 2.0
    assert [delta.scale for delta in read.deltas.values()] == pytest.approx([scale] * len(read.deltas))


@BOTH
def test_it_starts_as_the_base(name: str, make_training: MakeTraining, tmp_path: Path) -> None:
    """Also in 4 bits, up to their rounding; and an adapter that was not trained changes nothing."""
    folder = make_training(**CHATS)
    job = folder.job(init_lora_weights=name, epochs=0)
    wanted = Trainer(folder.job()).evaluate()
    assert Trainer(job).evaluate() == pytest.approx(wanted, abs=1e-5)
    assert Trainer(dataclasses.replace(job, load_in_4bit=True)).evaluate() == pytest.approx(wanted, rel=0.05)
    training.train(job)
    for key, tensor in merged(job, tmp_path / "merged").items():
        torch.testing.assert_close(tensor, weights(folder.root / "base")[key], atol=1e-6, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_losses_and_gradients_equal_those_of_transformers(
    name: str, kind: str, make_training: MakeTraining, compiled: bool
) -> None:
    job = make_training(kind, chats=chats_of(1, 6, 12, 30)).job(compile=compiled, init_lora_weights=name)
    compare(job, *pair_of(job))


def test_preferences_are_compared_with_the_base(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(8, 1), held_out=random_pairs(4, 2))
    job = folder.preference_job("dpo", init_lora_weights="pissa")
    training.train(job)
    found = [loss for _, loss in held_out_losses(read_metrics(Path(job.metrics)))]
    assert found[0] == pytest.approx(0.693147, abs=1e-5) and found[-1] < 0.69


def test_what_is_saved_and_kept_has_the_planned_size(make_training: MakeTraining) -> None:
    folder = make_training(**CHATS)
    job = folder.job(init_lora_weights="pissa", epochs=0)
    training.train(job)
    shape = read_shape(folder.root / "base")
    adapter = AdapterShape.of_options(shape, job)
    stored = load_file(Path(job.adapter) / "adapter_model.safetensors")
    assert sum(each.numel() for each in stored.values()) == 2 * adapter.weight_count
    kept = [getattr(pair, "start") for pair in PackedModel(job).adapters.values()]  # noqa: B009
    assert sum(part.numel() for parts in kept for part in parts) == adapter.weight_count
    assert adapter.file_bytes > 1.8 * AdapterShape.of_options(shape, folder.job()).file_bytes
