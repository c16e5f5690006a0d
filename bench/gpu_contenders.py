"""What `gpu.py` compares, each run in a process of its own: kolotune's trainer, and transformers with PEFT.

The peers have what TRL's trainer gives them at its best: batches of similar length, or one sequence without padding;
PyTorch's or flash attention; logits only at labels, some at a time; Liger's kernels; activations kept or recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from kolotune.engines.job import TrainJob
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens, epoch_steps
from kolotune.foundation.hardware import best_device

CONTENDERS = {
    "kolotune bf16": (),
    "kolotune 4 bits": (),
    "peft padded, 8 chats": (),
    "peft padded, 32 chats": (),
    "peft padded, 32 chats, recomputing": (),
    "peft padded, 32 chats, Liger": ("liger_kernel",),
    "peft padding-free, SDPA": (),
    "peft padding-free, flash": ("flash_attn",),
    "peft padding-free, flash, Liger": ("flash_attn", "liger_kernel"),
    "peft padded, 8 chats, 4 bits, recomputing": ("bitsandbytes",),
}
"""By name, with the packages that they need."""
_TOKENS_AT_ONCE = 4096  # of padding-free batches
_LABELS_AT_ONCE = 1024
_RANK, _RATE = 16, 1e-4
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Task:
    """What a contender trains.

    Attributes:
        contender: one of `CONTENDERS`.
        folder: with the folders `base` and `data`.
        chats: of each step.
        steps: how many.
        started: when the process was started, in seconds since the epoch.
    """

    contender: str
    folder: str
    chats: int
    steps: int
    started: float = 0.0


def run(task: Task) -> dict[str, float]:
    """Train, and return what was measured: see `_measure`."""
    if task.contender.startswith("kolotune"):
        return _run_kolotune(task)
    return _run_peft(task)


def _measure(task: Task, tokens: PreparedTokens, step: Callable[[list[int]], float]) -> dict[str, float]:
    """Make the steps; return tokens, labels and seconds after the first, losses, cold start and peak memory."""
    losses, cold, begun, trained = [], 0.0, 0.0, []
    for indices in epoch_steps(len(tokens), 0, 0, task.chats, 0):
        losses.append(step(indices))
        if cold:
            trained += indices
        else:
            _synchronize()
            cold, begun = time.time() - task.started, time.perf_counter()
    _synchronize()
    seconds = time.perf_counter() - begun
    count = sum(tokens.chat_length(index) for index in trained)
    on_gpu = best_device() == "cuda"
    return {
        "tokens": count,
        "labels": sum(tokens.label_count(index) for index in trained),
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "cold_start": cold,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def _synchronize() -> None:
    if best_device() == "cuda":
        torch.cuda.synchronize()


def _run_kolotune(task: Task) -> dict[str, float]:
    from kolotune.engines.native.trainer import Trainer

    folder = Path(task.folder)
    job = TrainJob(
        resume=False, nproc=1, nnodes=1, rdzv=None, sharded=False, dtype="bf16", compile=False,
        load_in_4bit="4 bits" in task.contender, epochs=1, learning_rate=_RATE, scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, batch_size=task.chats, gradient_accumulation=1, max_grad_norm=1.0, seed=0,
        lora_rank=_RANK, lora_alpha=2.0 * _RANK, lora_dropout=0.0, target_modules=_TARGETS, early_stopping=0,
        checkpoint_steps=0, base_model=str(folder / "base"), base_name="random", base_sha256="",
        data=str(folder / "data"), data_sha256="", adapter="", checkpoints="", metrics="",
    )  # fmt: skip
    trainer = Trainer(job)

    def step(indices: list[int]) -> float:
        loss = trainer.step(indices, _RATE)
        trainer.state.step += 1
        return loss

    return _measure(task, trainer.tokens, step)


def _run_peft(task: Task) -> dict[str, float]:
    tokens = PreparedTokens.load(Path(task.folder, "data", "train.safetensors"))
    device, name = best_device(), task.contender
    model = _peft_model(task, device)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0, fused=True)
    inner = model.get_base_model()

    def step(indices: list[int]) -> float:
        labels = sum(tokens.label_count(index) for index in indices)
        total = torch.zeros((), device=device)
        for batch, targets in _batches(tokens, indices, name):
            given = {key: each.to(device) for key, each in batch.items()}
            with torch.autocast(device, torch.bfloat16):
                hidden = inner.model(**given, use_cache=False).last_hidden_state
                loss = _chunked_loss(inner.lm_head, hidden.flatten(0, 1), targets.to(device)) / labels
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return _measure(task, tokens, step)


def _peft_model(task: Task, device: str) -> Any:
    """Return the base with LoRA beside it, as `get_peft_model` makes it."""
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    name, more = task.contender, {}
    if "4 bits" in name:
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    auto: Any = transformers.AutoModelForCausalLM
    attention = "flash_attention_2" if "flash" in name else "sdpa"
    folder = Path(task.folder, "base")
    model = auto.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention, device_map=device, **more)
    if "Liger" in name:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if "4 bits" in name:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=_TARGETS, task_type="CAUSAL_LM")
    )
    if "recomputing" in name:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _batches(tokens: PreparedTokens, indices: list[int], name: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield a step's micro-batches as the model's inputs, and the targets of all positions, int64 ``[positions]``."""
    ordered = sorted(indices, key=tokens.chat_length, reverse=True)
    if "padding-free" in name:
        yield from _padding_free(tokens, ordered)
        return
    size = 8 if "8 chats" in name else 32
    for start in range(0, len(ordered), size):
        chats = [tokens.sequence(index) for index in ordered[start : start + size]]
        longest = max(len(ids) for ids, _ in chats)
        ids = torch.zeros(len(chats), longest, dtype=torch.int64)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (own, labels) in enumerate(chats):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
            targets[row, : len(own) - 1] = labels[1:]
        yield {"input_ids": ids, "attention_mask": mask}, targets.flatten()


def _padding_free(tokens: PreparedTokens, ordered: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield chats end to end; positions that begin again say where one ends."""
    while ordered:
        chats, total = [], 0
        while ordered and (not chats or total + tokens.chat_length(ordered[0]) <= _TOKENS_AT_ONCE):
            index = ordered.pop(0)
            chats.append(tokens.sequence(index))
            total += tokens.chat_length(index)
        targets = [torch.cat([labels[1:], labels.new_full((1,), IGNORED)]) for _, labels in chats]
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in chats])
        ids = torch.cat([own for own, _ in chats])
        yield {"input_ids": ids[None], "position_ids": positions[None]}, torch.cat(targets)


def _chunked_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy where there is a target, with some logits in memory at a time."""
    kept = (targets != IGNORED).nonzero().squeeze(1)
    hidden, targets = hidden[kept], targets[kept]

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head(x).float(), wanted, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), _LABELS_AT_ONCE):
        chunk = slice(start, start + _LABELS_AT_ONCE)
        total = total + torch.utils.checkpoint.checkpoint(part, hidden[chunk], targets[chunk], use_reentrant=False)
    return total
