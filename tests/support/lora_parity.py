"""How far a training of ours and one of PEFT's are apart, and what PEFT makes of the adapter."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import merge

from .reference_training import plain_training

_IDS = torch.arange(48)[None] % 96


@dataclass(frozen=True)
class Parity:
    """The largest differences.

    Attributes:
        loss: of a step's loss from that of PEFT's layers and optimizer, which start the same.
        forward: of the merged model's logits from those of PEFT's model with the adapter on the original base.
        merge: of the merged model's logits from those of the model that PEFT merges.
        learned: how much the loss fell: what was not trained would be equal, too.
        changed: largest change of a logit by the adapter.
    """

    loss: float
    forward: float
    merge: float
    learned: float
    changed: float


def measure_parity(job: TrainJob, folder: Path) -> Parity:
    """Train a job, and the same with PEFT; merge the adapter with both.

    Args:
        job: the training.
        folder: for the adapter as it is before the training, and for the merged model.
    """
    start = dataclasses.replace(job, adapter=str(folder / "start"), metrics=str(folder / "start.jsonl"), epochs=0)
    training.train(start)
    training.train(job)
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    theirs = plain_training(job, _peft_model(job, Path(start.adapter)).train())
    base, target = Path(job.base_model), folder / "merged"
    target.mkdir()
    merge.merge_adapter(Path(job.adapter), base, target, tokenizer=base, dtype="fp32", reporter=PlainReporter())
    adapted: Any = peft.PeftModel.from_pretrained(_model(base), job.adapter).eval()
    merged, forward = _logits(_model(target)), _logits(adapted)
    return Parity(
        loss=max(abs(one - other) for one, other in zip(ours, theirs, strict=True)),
        forward=_largest(merged - forward),
        merge=_largest(merged - _logits(adapted.merge_and_unload())),
        learned=theirs[0] - min(theirs),
        changed=_largest(merged - _logits(_model(base))),
    )


def _peft_model(job: TrainJob, start: Path) -> peft.PeftModel:
    """Return PEFT's model before the training: with our first matrices, or with its own where the base gives them."""
    base: Any = _model(Path(job.base_model))
    if job.init_lora_weights == "default":
        return peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    settings = json.loads((start / "adapter_config.json").read_text(encoding="utf-8"))
    config = peft.LoraConfig(
        r=job.lora_rank, lora_alpha=job.lora_alpha, target_modules=settings["target_modules"],
        init_lora_weights=job.init_lora_weights, use_dora=job.use_dora, use_rslora=job.use_rslora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    assert isinstance(model, peft.PeftModel)
    return model


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(_IDS).logits
    return logits


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())
