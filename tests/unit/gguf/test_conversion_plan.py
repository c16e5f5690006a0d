"""A GGUF streamed by a conversion plan is byte for byte what llama.cpp's converter and its own writer make."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.llamacpp_writer import copy_gguf, is_kept

from kolotune import llamacpp
from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import conversion_plan, header, plan_cache, writer_form
from kolotune.gguf.conversion_plan import ConversionPlan
from kolotune.gguf.conversion_tracing import NoPlanError, RowTransform, recognise
from kolotune.gguf.model_skeleton import read_skeleton
from kolotune.gguf.plan_cache import PlanResult
from kolotune.gguf.quantize import quantize_file
from kolotune.weights.mapped_tensors import MappedTensors, row_blocks
from kolotune.weights.safetensors_header import Entry
from kolotune.weights.weight_files import weight_files

WORDS = 49152
# Architecture, dtype of the weights, type of the GGUF. Gemma's norms, to which 1 is added, have a separate test.
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "float16", "f16", {"tie_word_embeddings": True}),
    "llama-as-it-is": ("llama", "bfloat16", "bf16", {}),
    "llama-wide": ("llama", "float32", "f32", {}),
    "llama-narrowed": ("llama", "bfloat16", "f16", {}),
    "llama-in-parts": ("llama", "float16", "f16", {"shard": "2MB"}),
    "llama-3-rope": (
        "llama", "float16", "f16",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0,
                             "low_freq_factor": 1.0, "original_max_position_embeddings": 128}},
    ),
    "mistral": ("mistral", "float16", "f16", {}),
    "ministral3": ("ministral3", "float16", "f16", {"head_dim": 16}),
    "qwen2": ("qwen2", "float16", "f16", {}),
    "qwen3": ("qwen3", "float16", "f16", {}),
    "gemma": ("gemma", "float32", "f16", {}),
    "gemma2": ("gemma2", "float32", "f32", {}),
    "gemma3": ("gemma3", "float32", "f16", {}),
    "gemma3-narrow": ("gemma3", "float16", "f16", {}),
    "phi3": ("phi3", "float16", "f16", {"pad_token_id": 2}),
    "gpt2": ("gpt2", "float16", "f16", {"n_ctx": 128}),
    "mixtral": ("mixtral", "float16", "f16", {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe", "bfloat16", "bf16",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
    ),
}  # fmt: skip
WITHOUT_PLAN = ("gpt2", "mixtral", "qwen2_moe")
_CONVERT = """
import os, sys
from pathlib import Path
from kolotune.gguf.converter import convert
root, models, *pairs = sys.argv[1:]
for form in ("converter", "writer"):
    os.environ["KOLOTUNE_GGUF_FORM"] = form
    for pair in pairs:
        name, kind = pair.split(":")
        convert(Path(root, "convert_hf_to_gguf.py"), f"{models}/{name}", kind, f"{models}/{name}.{form}.gguf")
"""
_TRACE = """
import sys
from pathlib import Path
from kolotune.gguf import conversion_tracing
root, models = sys.argv[1:3]
for pair in sys.argv[3:]:
    name, kind = pair.split(":")
    target = Path(models, f"{name}.plan")
    target.mkdir()
    assert conversion_tracing.main([root, f"{models}/bare/{name}", kind, str(target)]) == 0
"""


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    toolchain: llamacpp.Toolchain,
    reporter: PlainReporter,
) -> Path:
    """Every model; the converter's GGUF, as it is, in the writer's form, and what llama.cpp's writer makes of it; the
    plan traced from a folder without its weights' values.
    """
    models = tmp_path_factory.mktemp("models")
    (models / "bare").mkdir()
    for name, (kind, dtype, _, more) in MODELS.items():
        tiny_model(kind, models / name, dtype=dtype, **{"vocab_size": WORDS, **more})
        for file in TOKENIZER_FILES:
            if (packaged_model.unpack(reporter) / file).is_file():
                shutil.copyfile(packaged_model.unpack(reporter) / file, models / name / file)
        # With SmolLM2's tokenizer the converter would take these for other models.
        if kind in ("gemma", "gemma2", "phi3", "qwen2", "qwen2_moe", "qwen3"):
            shutil.copyfile(_sentencepiece(models), models / name / "tokenizer.model")
        read_skeleton(models / name).write(models / "bare")
    pairs = [f"{name}:{type_}" for name, (_, _, type_, _) in MODELS.items()]
    for code in (_CONVERT, _TRACE):
        argv = [sys.executable, "-c", code, str(toolchain.root), str(models), *pairs]
        child = subprocess.run(argv, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-3000:]
    for name in MODELS:
        copy_gguf(models / f"{name}.converter.gguf", models / f"{name}.gguf")
    return models


def _sentencepiece(models: Path) -> Path:
    import sentencepiece

    model = models / "sentencepiece.model"
    if not model.is_file():
        text = models / "text"
        text.write_text("\n".join(f"{number} keepers of {number * 7} lights" for number in range(300)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(model.with_suffix("")), vocab_size=100, minloglevel=2
        )
    return model


def traced(models: Path, name: str) -> PlanResult:
    return plan_cache.read_plan(models / f"{name}.plan")


def plan_of(models: Path, name: str) -> ConversionPlan:
    result = traced(models, name)
    assert result.plan is not None, result.reason
    return result.plan


def streamed(models: Path, name: str, target: Path) -> Path:
    tensors = MappedTensors(weight_files(models / name))

    def blocks(entry: Entry) -> Iterator[np.ndarray]:
        return (tensors[entry.name][rows] for rows in row_blocks(entry))

    conversion_plan.write_gguf(plan_of(models, name), target, tensors.entries, blocks)
    return target


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma3-narrow", *WITHOUT_PLAN)])
def test_every_byte(name: str, models: Path, tmp_path: Path) -> None:
    assert streamed(models, name, tmp_path / "out.gguf").read_bytes() == (models / f"{name}.gguf").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_converter_itself_writes_the_same_form(name: str, models: Path) -> None:
    """Also where there is no plan: GPT-2's transposed weights, experts that are stacked."""
    written = models / f"{name}.writer.gguf"
    assert written.read_bytes() == (models / f"{name}.gguf").read_bytes()
    assert writer_form.is_in_form(header.read(written))
    assert not writer_form.is_in_form(header.read(models / f"{name}.converter.gguf"))
    assert is_kept(written)


def test_a_matrix_of_one_row_is_quantized(models: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    """Its shape has one dimension in the form, as in quantized files: the gate of a shared expert."""
    source, target = models / "qwen2_moe.writer.gguf", tmp_path / "Q8_0.gguf"
    gate = "blk.0.ffn_gate_inp_shexp.weight"
    assert header.read(models / "qwen2_moe.converter.gguf").tensors[gate].shape == (64, 1)
    quantize_file(source, target, "Q8_0", tmp_path / "log", reporter)
    assert header.read(source).tensors[gate].shape == header.read(target).tensors[gate].shape == (64,)


def test_one_is_added_in_fp32_and_the_form_stays(models: Path, tmp_path: Path) -> None:
    assert is_kept(streamed(models, "gemma3-narrow", tmp_path / "out.gguf"))


def test_one_is_added_to_gemma_s_norms_in_fp32(models: Path, tmp_path: Path) -> None:
    """The converter adds it in f16, where what was trained is lost; the model computes it in fp32."""
    name = "gemma3-narrow"
    streamed_bytes = streamed(models, name, tmp_path / "out.gguf").read_bytes()
    converted = (models / f"{name}.gguf").read_bytes()
    tensors = MappedTensors(weight_files(models / name))
    plan = plan_of(models, name)
    start, norms = len(plan.header), 0
    assert len(streamed_bytes) == len(converted) and streamed_bytes[:start] == converted[:start]
    for tensor in plan.tensors:
        ours, theirs = streamed_bytes[start : start + tensor.size], converted[start : start + tensor.size]
        start += -(-tensor.size // 32) * 32
        if tensor.added:
            norms += 1
            exact = np.float32(1) + tensors[str(tensor.source)].astype(np.float32)
            assert np.array_equal(np.frombuffer(ours, np.float32), exact) and ours != theirs
            np.testing.assert_allclose(exact, np.frombuffer(theirs, np.float32), rtol=1e-3)
        else:
            assert ours == theirs, tensor.name
    assert start == len(streamed_bytes) == plan.size and norms == 13


@pytest.mark.parametrize(("name", "tensor"), zip(WITHOUT_PLAN, ("attn_qkv", "exps", "exps"), strict=True))
def test_more_than_permuted_rows_is_left_to_the_converter(name: str, tensor: str, models: Path) -> None:
    result = traced(models, name)
    assert result.plan is None and result.is_convertible and tensor in result.reason


def test_the_digest_covers_all_that_the_converter_sees(models: Path, tmp_path: Path) -> None:
    skeleton = read_skeleton(models / "llama")
    assert skeleton.digest() == read_skeleton(models / "llama").digest()
    seen = {skeleton.digest()}
    for change in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md", "name", "weights"):
        folder = tmp_path / change / ("other" if change == "name" else "llama")
        shutil.copytree(models / "llama", folder)
        if change == "weights":
            for path in folder.glob("*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            assert read_skeleton(folder).digest() in seen, "values are not part of it"
            continue
        if change != "name":
            file = folder / change
            file.write_text((file.read_text(encoding="utf-8") if file.is_file() else "") + " ", encoding="utf-8")
        seen.add(read_skeleton(folder).digest())
    assert len(seen) == 6


def test_a_plan_is_traced_once_and_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: llamacpp.Toolchain
) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    skeleton = read_skeleton(models / "llama")
    first = plan_cache.find_plan(skeleton, "f16", toolchain, tmp_path / "log")
    assert first.plan is not None and plan_cache.is_planned(skeleton, "f16", toolchain)
    monkeypatch.setattr("kolotune.runners.child_process.run", lambda *_, **__: pytest.fail("traced again"))
    assert plan_cache.find_plan(skeleton, "f16", toolchain, tmp_path / "log") == first == traced(models, "llama")
    assert len(list((tmp_path / "conversions").iterdir())) == 1, "nothing is left behind"


def test_a_switch_turns_plans_off(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: llamacpp.Toolchain
) -> None:
    monkeypatch.setenv("KOLOTUNE_CONVERSION_PLAN", "off")
    result = plan_cache.find_plan(read_skeleton(models / "llama"), "f16", toolchain, tmp_path / "log")
    assert result.plan is None and not result.is_convertible


def test_flags_are_changed_in_the_header(models: Path, tmp_path: Path) -> None:
    name = "tokenizer.ggml.add_bos_token"
    plan = plan_of(models, "llama")
    for value in (True, False):
        changed = header.with_flag(plan.header, name, value)
        assert len(changed) == len(plan.header)
        path = tmp_path / "x.gguf"
        path.write_bytes(changed + (models / "llama.gguf").read_bytes()[len(changed) :])
        assert header.read(path).fields[name] is value
    assert header.with_flag(plan.header, "no.such", True) == plan.header


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(2, 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, RowTransform()),
        (_interleaved, RowTransform((0, 2, 1, 3, 4, 6, 5, 7))),
        (lambda x: x + 1, RowTransform(added=1.0)),
        (lambda x: _interleaved(x) - 0.5, RowTransform((0, 2, 1, 3, 4, 6, 5, 7), -0.5)),
        (lambda x: x.clone(), RowTransform()),
    ],
)
@pytest.mark.parametrize("width", [1, 6])
def test_recognised_transforms(change: Any, expected: RowTransform, width: int) -> None:
    assert recognise(change, "x", (8, width), "F16") == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2,
        lambda x: -x,
        lambda x: x.abs(),
        lambda x: x.round(),
        lambda x: x.clamp(min=-1),
        lambda x: x.flip(1),
        lambda x: x.flip(0) * 1.5,
        lambda x: x.T,
        lambda x: x[:4],
        lambda x: x[:1].expand(8, 8).clone(),
        lambda x: x.exp(),
        lambda x: x.cumsum(0),
        lambda x: x.reshape(4, 16),
        lambda x: x.sum(),
        lambda x: torch.where(x.abs() < 0.1, 0.0, x),
        lambda x: x + torch.arange(8),
    ],
)
def test_other_transforms_have_no_plan(change: Any) -> None:
    with pytest.raises(NoPlanError):
        recognise(change, "x", (8, 8), "F16")
