"""Merging: equal to what PEFT merges in fp32, whatever the adapter, and small in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import merge

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomized(model: Any, config: peft.LoraConfig) -> Any:
    """Return a PEFT model whose adapter and other trained weights have random changes."""
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return adapted.eval()


def merge_into(adapter: Path, base: Path, target: Path, dtype: str = "fp32") -> dict[str, Any]:
    target.mkdir()
    return merge.merge_adapter(adapter, base, target, tokenizer=base, dtype=dtype, reporter=PlainReporter())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def ulps(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference in units in the last place of `result`'s type; `expected` is fp32."""
    digits = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}[result.dtype]
    smallest = {torch.float16: -14, torch.bfloat16: -126, torch.float32: -126}[result.dtype]
    exponent = torch.frexp(expected.double())[1].sub(1).clamp(min=smallest)
    unit = torch.ldexp(torch.ones_like(expected, dtype=torch.float64), exponent - digits)
    return float(((result.double() - expected.double()).abs() / unit).max())


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": LINEAR}),
    "qwen2": ("qwen2", {"target_modules": "all-linear"}),
    "gemma": ("gemma", {"target_modules": "all-linear"}),
    "ranks by pattern": (
        "llama",
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}},
    ),
    "alphas by pattern": (
        "llama",
        {"target_modules": LINEAR, "alpha_pattern": {"v_proj": 1, "^model.layers.0.self_attn.o_proj": 40}},
    ),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "gpt-2's Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt-2 with its head": ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norm trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_peft(kind: str, dtype: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    architecture, options = KINDS[kind]
    more = {"tie_word_embeddings": False} if architecture == "gpt2" else {}
    model = tiny_model(architecture, tmp_path / "base", **more)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    adapted = randomized(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **options}))
    adapted.save_pretrained(tmp_path / "adapter")
    facts = merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", dtype)
    expected = adapted.merge_and_unload().state_dict()
    result = tensors_of(tmp_path / "merged")
    base = tensors_of(tmp_path / "base")
    assert result.keys() == base.keys() and facts["tensors"] == len(result)
    for name, tensor in result.items():
        assert tensor.dtype is DTYPES[dtype]
        key = name if name in expected else f"transformer.{name}"
        assert ulps(tensor, expected[key]) <= 1, name
    changed = [name for name in result if not torch.equal(expected.get(name, before.get(name)), before[name])]
    assert changed or architecture == "gpt2"
    assert facts["adapted"] == sum("lora_" in name for name in _adapter(tmp_path)) // 2
    assert facts["stored_wider"] == []


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("options", "unties"),
    [
        ({"target_modules": LINEAR}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, None),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_embeddings(
    options: dict[str, Any], unties: bool | None, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    """The merged model computes the same as the adapter on its base, tied or not."""
    adapted = randomized(
        tiny_model("llama", tmp_path / "base", tie_word_embeddings=True), peft.LoraConfig(r=4, lora_alpha=10, **options)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    facts = merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    result = tensors_of(tmp_path / "merged")
    unties = "lm_head.weight" in result if unties is None else unties
    assert ("lm_head.weight" in result) == unties and facts["tensors"] == len(result)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is not unties
    loaded, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied is not unties
    # Compared with the adapter as PEFT loads it, not with the object that it was trained in.
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(0, 96, (2, 25))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reloaded(ids).logits, atol=2e-4, rtol=1e-4)


def _simple(tmp_path: Path, tiny_model: Callable[..., Any], **config: Any) -> Any:
    model = randomized(
        tiny_model("llama", tmp_path / "base", **config), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    return model


def _change(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(("dtype", "kept"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_out_of_range_of_f16_stay_wider_and_are_reported(
    dtype: str, kept: torch.dtype, tmp_path: Path, tiny_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _simple(tmp_path, tiny_model, dtype=dtype)
    for name in (Q, K):
        _change(tmp_path / "base", name, lambda tensor: tensor[0].fill_(131072.0))
    base = tensors_of(tmp_path / "base")
    capsys.readouterr()
    facts = merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", "f16")
    result = tensors_of(tmp_path / "merged")
    assert facts["stored_wider"] == [name for name in result if name in (Q, K)]
    assert "2 weights are out of f16's range" in capsys.readouterr().out
    assert result[K].dtype is kept and torch.equal(result[K], base[K])
    assert result[Q].dtype is torch.float32 and bool(result[Q].isfinite().all())
    assert all(each.dtype is torch.float16 for name, each in result.items() if name not in (Q, K))


def test_the_largest_f16_is_in_range(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    _simple(tmp_path, tiny_model)
    _change(tmp_path / "base", K, lambda tensor: tensor[0].fill_(-65504.0))
    facts = merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", "f16")
    assert facts["stored_wider"] == [] and float(tensors_of(tmp_path / "merged")[K].min()) == -65504.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "adapter"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite(
    value: float, where: str, dtype: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    _simple(tmp_path, tiny_model)
    name = Q if where == "base" else f"base_model.model.{Q.removesuffix('.weight')}.lora_B.weight"
    _change(tmp_path / where, name, lambda tensor: tensor[1].fill_(value))
    with pytest.raises(ArtifactError, match=rf"{name}.* not finite"):
        merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", dtype)


def test_a_sharded_base(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    model = randomized(
        tiny_model("llama", tmp_path / "base", shard="100KB"), peft.LoraConfig(r=4, target_modules=LINEAR)
    )
    model.save_pretrained(tmp_path / "adapter")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    result, expected = tensors_of(tmp_path / "merged"), model.merge_and_unload().state_dict()
    assert result.keys() == expected.keys() and all(ulps(result[name], expected[name]) <= 1 for name in result)


@pytest.mark.parametrize(
    "other", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_attention_heads": 8, "head_dim": 16}]
)
def test_a_base_of_a_different_shape_is_refused(
    other: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    _simple(tmp_path, tiny_model)
    tiny_model("llama", tmp_path / "other", **other)
    with pytest.raises(ArtifactError) as caught:
        merge_into(tmp_path / "adapter", tmp_path / "other", tmp_path / "merged")
    assert "base" in caught.value.cause and "--base" in caught.value.hint


def test_a_different_architecture_is_refused(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    _simple(tmp_path, tiny_model)
    tiny_model("gpt2", tmp_path / "other")
    with pytest.raises(ArtifactError, match="q_proj"):
        merge_into(tmp_path / "adapter", tmp_path / "other", tmp_path / "merged")


def test_a_head_of_a_different_size_is_refused(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    options = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    randomized(tiny_model("llama", tmp_path / "base"), options).save_pretrained(tmp_path / "adapter")
    tiny_model("llama", tmp_path / "other", vocab_size=50)
    with pytest.raises(ArtifactError, match=r"lm_head\.weight"):
        merge_into(tmp_path / "adapter", tmp_path / "other", tmp_path / "merged")


def test_a_cut_base_leaves_no_merged_model(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    _simple(tmp_path, tiny_model)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ArtifactError, ModelError), match=r"model\.safetensors"):
        merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")


@pytest.mark.parametrize(
    ("kind", "dtype", "arithmetic"),
    [("llama", "f16", "float16"), ("llama", "bf16", "bfloat16"), ("llama", "fp32", "float32"),
     ("gemma", "f16", "bfloat16")],
)  # fmt: skip
def test_config_and_tokenizer_are_copied(
    kind: str, dtype: str, arithmetic: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    options = peft.LoraConfig(r=4, target_modules=["q_proj"])
    randomized(tiny_model(kind, tmp_path / "base"), options).save_pretrained(tmp_path / "adapter")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("trained", encoding="utf-8")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_text("base", encoding="utf-8")
    (tmp_path / "base" / "optimizer.pt").write_text("never", encoding="utf-8")
    target = tmp_path / "merged"
    target.mkdir()
    merge.merge_adapter(
        tmp_path / "adapter", tmp_path / "base", target, tokenizer=tokenizer, dtype=dtype, reporter=PlainReporter()
    )
    assert (target / "tokenizer.json").read_text(encoding="utf-8") == "trained"
    assert (target / "chat_template.jinja").read_text(encoding="utf-8") == "base"
    assert not (target / "optimizer.pt").exists() and not list(target.glob("adapter*"))
    assert transformers.AutoConfig.from_pretrained(target).dtype is getattr(torch, arithmetic)


_CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from safetensors import safe_open
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import merge
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) << 10

peak, before, done = 0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
root = Path(sys.argv[1])
(root / "merged").mkdir()
merge.merge_adapter(root / "adapter", root / "base", root / "merged", tokenizer=root / "base", dtype="f16",
                    reporter=PlainReporter())
done = True
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("use_dora", [False, True])
def test_memory_is_that_of_the_largest_tensor(use_dora: bool, tmp_path: Path) -> None:
    """400 MB of weights in tensors of 32 MB (bf16, 4096 x 4096)."""
    size, layers = 4096, 12
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(layers)]
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    weight = torch.randn(size, size, generator=generator).bfloat16()
    save_file({f"{name}.weight": weight.clone() for name in names}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    halves = {f"base_model.model.{name}.lora_A.weight": torch.randn(2, size) for name in names}
    halves |= {f"base_model.model.{name}.lora_B.weight": torch.randn(size, 2) for name in names}
    if use_dora:
        halves |= {f"base_model.model.{name}.lora_magnitude_vector": torch.rand(size) + 1 for name in names}
    save_file(halves, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": use_dora}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    child = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, check=True)
    peak = int(child.stdout.splitlines()[-1])
    largest = 2 * size * size
    # The sum in fp32, the stored result, and what libraries need.
    assert peak < 7 * largest < layers * largest, f"{peak >> 20} MB for tensors of {largest >> 20} MB"
    print(f"{peak >> 20} MB")
    shutil.rmtree(tmp_path / "merged")
