"""DoRA: losses and gradients are those of transformers' autograd and of PEFT, on every way that a step is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.packed_models import chats_of, check_recomputing, compare, gradients, pair_of
from support.reference_training import weights_of
from support.training import TrainingFolder, random_pairs

from kolotune.engines.adapter_folder import AdapterContent, save_adapter
from kolotune.engines.native import dora, lora, training
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.lora import LoraLinear
from kolotune.engines.native.memory import layer_activation_bytes
from kolotune.engines.native.model import PackedModel, TransformersModel
from kolotune.engines.native.nf4 import quantize
from kolotune.engines.native.sequence_packing import pack
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.weights.model_shape import AdapterShape, read_shape

MakeTraining = Callable[..., TrainingFolder]
CHATS = {"chats": chats_of(1, 6, 12, 30)}


def test_lengths_of_rows_without_the_whole_matrix() -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(9, 20), torch.randn(3, 20), torch.randn(9, 3)
    found = dora.adapted_lengths(dora.row_squares(weight), down @ weight.T, down, up)
    torch.testing.assert_close(found, torch.linalg.norm(weight + up @ down, dim=1), atol=1e-5, rtol=1e-5)


# With biases; with normalized heads; with norms behind the layers; with layers that the files have as one.
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_losses_and_gradients_equal_those_of_transformers(
    kind: str, make_training: MakeTraining, compiled: bool
) -> None:
    job = make_training(kind, **CHATS).job(compile=compiled, use_dora=True)
    models = pair_of(job)
    compare(job, *models)
    compare(job, *models, share=False)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "v_proj", "down_proj"]}, {"use_rslora": True}])
def test_some_of_the_layers_that_are_computed_as_one(options: dict[str, Any], make_training: MakeTraining) -> None:
    job = make_training("qwen2", **CHATS).job(use_dora=True, **options)
    compare(job, *pair_of(job, DeviceOperations()))


def test_on_a_base_in_4_bits(make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(use_dora=True)
    exact, plain = pair_of(job)
    packed = PackedModel(dataclasses.replace(job, load_in_4bit=True))
    with torch.no_grad():
        packed.flat.parameter.copy_(exact.flat.parameter)
        for layer in plain.model.modules():
            if isinstance(layer, LoraLinear):
                layer.base.weight.copy_(quantize(layer.base.weight).dequantize(torch.float32))
                layer._squares = dora.row_squares(layer.base.weight)
    packed.updated()
    compare(job, packed, plain)


def test_recomputing_activations_changes_no_bit(make_training: MakeTraining, compiled: bool) -> None:
    check_recomputing(make_training(**CHATS).job(compile=compiled, use_dora=True))


def test_bf16_stays_near_fp32(make_training: MakeTraining, compiled: bool) -> None:
    folder = make_training(initializer_range=0.1, **CHATS)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    exact, rough = (pair_of(folder.job(dtype=dtype, compile=compiled, use_dora=True))[0] for dtype in ("fp32", "bf16"))
    wanted, found = (gradients(model, tokens, range(6), 0.1) for model in (exact, rough))
    assert found[0] == pytest.approx(wanted[0], rel=0.02)
    whole, near = (torch.cat([each.flatten() for each in each[1].values()]) for each in (wanted, found))
    assert float(torch.cosine_similarity(whole, near, 0)) > 0.99


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the packed step, and transformers' model with Conv1D
def test_losses_and_gradients_equal_those_of_peft(kind: str, make_training: MakeTraining, tmp_path: Path) -> None:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    folder = make_training(kind, **CHATS, **no_dropout)
    job = folder.job(use_dora=True)
    model: Any
    if kind == "llama":
        model, _ = pair_of(job)
    else:
        model = TransformersModel(job, "cpu")
        with torch.no_grad():
            for pair in model.adapters.values():
                pair.lora_B.normal_(std=0.05)
                pair.lora_magnitude_vector.mul_(torch.rand(len(pair.lora_B)) + 0.5)
    content = AdapterContent(
        lora.adapter_tensors(model.adapters), base_name="tiny", rank=4, alpha=8, dropout=0.0, has_magnitudes=True
    )
    save_adapter(tmp_path / "adapter", content)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    loss, found = gradients(model, tokens, range(len(tokens)), 0.1)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.root / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    total = torch.zeros(())
    for number in range(len(tokens.offsets) - 1):
        ids, labels = tokens.sequence(number)
        logits = theirs(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        total = total + (losses * weights_of(tokens, number)[1:]).sum()
    (0.1 * total).backward()
    assert loss == pytest.approx(float(total.detach()), abs=1e-4)
    by_name = {name.removeprefix("base_model.model."): each.grad for name, each in theirs.named_parameters()}
    for name, gradient in found.items():
        layer, part = name.split()
        wanted = by_name[f"{layer}.{part}.default.weight"]
        assert wanted is not None
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, atol=1e-5 * max(scale, 1), rtol=1e-4, msg=name)


def test_a_training_begins_as_the_base(make_training: MakeTraining) -> None:
    """Magnitudes start as the lengths of the weights, which change nothing, for preferences' reference, too."""
    folder = make_training(chats=random_pairs(8, 1), held_out=random_pairs(4, 2))
    job = folder.preference_job("dpo", use_dora=True)
    training.train(job)
    losses = [loss for _, loss in held_out_losses(read_metrics(Path(job.metrics)))]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.69
    # The reference is lost and computed again with a trained adapter in memory.
    reference = load_file(job.reference)
    Path(job.reference).unlink()
    training.train(dataclasses.replace(job, resume=True, epochs=3))
    again = load_file(job.reference)
    for name, tensor in reference.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-5)


def test_rows_of_zeros_stay_zero(make_training: MakeTraining) -> None:
    model = PackedModel(make_training().job(use_dora=True))
    linear = model.decoder.layers[0].out
    magnitudes = linear._magnitudes
    assert magnitudes is not None
    magnitudes._squares[0] = 0
    model.reset()
    inputs = linear.new_input(3)
    inputs[:, : linear.inputs] = 1
    assert linear.forward(inputs).isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_match_the_formula(dtype: str, make_training: MakeTraining) -> None:
    folder = make_training(chats=chats_of(1, 6, 12, 90), hidden_size=128, intermediate_size=384)
    shape = read_shape(folder.root / "base")
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    packed = pack(tokens, range(6), True)
    batch, found = packed.batch_shape(True), []
    for use_dora in (False, True):
        job = folder.job(dtype=dtype, use_dora=use_dora)
        model = PackedModel(job, operations=DeviceOperations())
        kept: list[int] = []
        with torch.no_grad():
            for linear in (each for layer in model.decoder.layers for each in layer.linears):
                before: list[torch.Tensor] = []
                linear.forward(linear.new_input(len(packed.ids)), before)
                kept.append(sum(each.nbytes for each in before))
        formula = layer_activation_bytes(shape, AdapterShape.of_options(shape, job), batch, 4 if dtype == "fp32" else 2)
        found.append((sum(kept) // len(model.decoder.layers), formula, AdapterShape.of_options(shape, job)))
        assert found[-1][2].weight_count == model.flat.parameter.numel()
    (_, without, _), (kept_with, formula, _) = found
    assert kept_with == formula - without > 0
