"""The reference for what engines compute: PEFT and transformers, in the plainest possible loop."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

from kolotune.engines.job import TrainJob
from kolotune.engines.prepared_tokens import PreparedTokens, epoch_order


def plain_loop(job: TrainJob, initial: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with PEFT's layers, transformers' schedule, padded batches with an attention mask, and all logits.

    Returns:
        The loss of each step, and the adapter's weights.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, initial, is_trainable=True).train()
    return plain_training(job, model), peft.get_peft_model_state_dict(model)


def plain_training(job: TrainJob, model: peft.PeftModel) -> list[float]:
    """Train a model of PEFT's as `plain_loop` does; return the loss of each step."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    size = job.batch_size * job.gradient_accumulation
    steps = -(-len(tokens) // size) * job.epochs
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=job.learning_rate,
        loraplus_lr_ratio=job.lora_plus_ratio,
        loraplus_weight_decay=job.weight_decay,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, min(steps // 10, 100), steps)
    curve = []
    for epoch in range(job.epochs):
        order = epoch_order(epoch, len(tokens), job.seed)
        for start in range(0, len(order), size):
            numbers = [each for index in order[start : start + size] for each in tokens.sequences(index)]
            step = [(*tokens.sequence(each), weights_of(tokens, each)) for each in numbers]
            labelled = sum(float(weights[1:].sum()) for _, _, weights in step)
            total = 0.0
            for first in range(0, len(step), job.batch_size):
                ids, labels, weights = zip(*step[first : first + job.batch_size], strict=True)
                padded_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=77)
                padded_labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
                attention_mask = torch.nn.utils.rnn.pad_sequence(
                    [torch.ones_like(chat) for chat in ids], batch_first=True
                )
                logits = model(input_ids=padded_ids, attention_mask=attention_mask).logits[:, :-1]
                losses = torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), padded_labels[:, 1:].reshape(-1), reduction="none"
                )
                padded_weights = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
                summed = (losses * padded_weights[:, 1:].reshape(-1)).sum()
                (summed / labelled).backward()
                total += float(summed.detach()) / labelled
            torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curve.append(total)
    return curve


def weights_of(tokens: PreparedTokens, number: int) -> torch.Tensor:
    """Return how much the loss on each token of a sequence counts."""
    given, (_, labels) = tokens.sequence_weights(number), tokens.sequence(number)
    return (labels != -100).float() if given is None else given


@torch.no_grad()
def held_out_loss(base: Path, adapter: Path, prepared: Path) -> float:
    """Return the weighted mean loss of the held-out chats' trained tokens, in fp32, one chat at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokens = PreparedTokens.load(prepared / "held_out.safetensors")
    total, labelled = 0.0, 0.0
    for number in range(len(tokens.offsets) - 1):
        ids, labels = tokens.sequence(number)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        weights = weights_of(tokens, number)[1:]
        total += float((torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none") * weights).sum())
        labelled += float(weights.sum())
    return total / labelled
