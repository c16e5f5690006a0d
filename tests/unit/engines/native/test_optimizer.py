"""The optimizer changes adapters as PEFT's LoRA+ and PyTorch's AdamW do, and its state survives a checkpoint."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from kolotune.engines.native.lora import FlatAdapters, LoraPair
from kolotune.engines.native.optimizer import AdapterOptimizer, FusedAdamW

RATES = [1e-2, 3e-2, 2e-2, 1e-3, 5e-3]
DECAY = 0.1
SIZES = {"0": (12, 20), "2": (20, 7)}


def adapters_of() -> tuple[dict[str, LoraPair], FlatAdapters]:
    torch.manual_seed(0)
    pairs = {name: LoraPair(*sizes, 4, 2.0, 0.0) for name, sizes in SIZES.items()}
    # In the order of the packed step, which is not that of the groups.
    return pairs, FlatAdapters(pairs, [("0", "lora_A"), ("2", "lora_A"), ("0", "lora_B"), ("2", "lora_B")])


def gradient(step: int, flat: FlatAdapters) -> dict[str, Tensor]:
    torch.manual_seed(10 + step)
    return {name: torch.randn(each.shape) for name, each in flat.named(flat.parameter.detach()).items()}


def make_step(step: int, optimizer: AdapterOptimizer, flat: FlatAdapters) -> None:
    optimizer.zero_grad()
    assert flat.parameter.grad is not None and not flat.parameter.grad.any()
    views = flat.named(flat.parameter.grad)
    for name, each in gradient(step, flat).items():
        views[name].copy_(each)
    optimizer.step(RATES[step])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_updates_equal_those_of_peft(ratio: float, fused: bool) -> None:
    pairs, flat = adapters_of()
    base = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(SIZES)))
    theirs: dict[str, nn.Parameter] = {}
    for name in SIZES:
        for part in ("lora_A", "lora_B"):
            parameter = getattr(model.base_model.model.get_submodule(name), part)["default"].weight
            parameter.data.copy_(getattr(pairs[name], part))
            theirs[f"{name}.{part}"] = parameter
    reference = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY
    )
    initial = [group["lr"] for group in reference.param_groups]
    optimizer = AdapterOptimizer(pairs, flat, DECAY, ratio, fused)
    for step, rate in enumerate(RATES):
        make_step(step, optimizer, flat)
        for name, each in gradient(step, flat).items():
            theirs[name].grad = each
        for group, factor in zip(reference.param_groups, initial, strict=True):
            group["lr"] = rate * factor
        reference.step()
    for name, each in flat.named(flat.parameter.detach()).items():
        torch.testing.assert_close(each, theirs[name].detach(), atol=1e-6, rtol=1e-6)
    pair = pairs["0"]
    assert torch.equal(pair.lora_B.detach(), flat.named(flat.parameter.detach())["0.lora_B"]), "it is a view"


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_state_survives_a_checkpoint(ratio: float) -> None:
    pairs, flat = adapters_of()
    optimizer = AdapterOptimizer(pairs, flat, DECAY, ratio, fused=True)
    assert optimizer.tensors() == {}
    for step in range(2):
        make_step(step, optimizer, flat)
    kept = {name: each.clone() for name, each in optimizer.tensors().items()}
    names = [f"{name}.{part}" for name in SIZES for part in ("lora_A", "lora_B")]
    assert set(kept) == {"step."} | {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in names}
    other_pairs, other_flat = adapters_of()
    other_flat.parameter.data.copy_(flat.parameter.data)
    other = AdapterOptimizer(other_pairs, other_flat, DECAY, ratio, fused=True)
    other.restore(kept)
    for step in (2, 3, 4):
        make_step(step, optimizer, flat)
        make_step(step, other, other_flat)
    assert torch.equal(flat.parameter, other_flat.parameter)
    assert float(kept["step."]) == 2, "a resumed training does not change what it was resumed from"


def test_the_fused_step_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]

    fused, reference = (
        FusedAdamW(groups(ours), DECAY),
        torch.optim.AdamW(groups(theirs), weight_decay=DECAY, fused=True),
    )
    for step, rate in enumerate(RATES):
        for mine, other in zip(ours[: 2 + step % 2], theirs, strict=False):  # the last one not in all steps
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        if step % 2 == 0:
            ours[2].grad = theirs[2].grad = None
        for group in (*fused.param_groups, *reference.param_groups):
            group["lr"] = rate
        fused.step()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(value, reference.state[other][name]) for name, value in fused.state[mine].items())


def test_it_loads_no_compiler() -> None:
    script = """
import sys, torch
from kolotune.engines.native.optimizer import FusedAdamW
parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
optimizer = FusedAdamW([{"params": [parameter], "lr": 0.1}], 0.0)
optimizer.step()
print(float(parameter[0]) < 1, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
