"""Kinds of PEFT adapters: a merged model computes what PEFT's own model computes in fp32, or the kind is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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
from kolotune.weights.adapter import read_adapter
from kolotune.weights.merge import MergedModel, tokenizer_folder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4
EXPERTS = {
    "hidden_size": 32, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
DEEPSEEK = {
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
RECURRENT = {"head_dim": 16, "initializer_range": 0.04, "H_cycles": 1, "L_cycles": 1}  # rounding adds up in cycles
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SMALL = {"initializer_range": 0.08}  # PEFT's own decomposition, in fp32, is only so exact


@dataclass(frozen=True)
class Kind:
    """An adapter to make: the base's family and settings, and the options of PEFT's config."""

    family: str
    options: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    is_slow: bool = True


KINDS = {
    "plain": Kind("llama", {"target_modules": LINEAR}, is_slow=False),
    "DoRA": Kind("llama", {"target_modules": LINEAR, "use_dora": True}, is_slow=False),
    "DoRA, rank-stabilised, ranks by pattern": Kind(
        "qwen3", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    ),
    "DoRA on biased layers": Kind("qwen2", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "DoRA on Conv1D": Kind(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        is_slow=False,
    ),
    "DoRA on embedding and head": Kind("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA on a tied embedding": Kind(
        "llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {"tie_word_embeddings": True}
    ),
    "DoRA with a trained head": Kind(
        "llama", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    ),
    "PiSSA": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa"}, SMALL, is_slow=False),
    "PiSSA on Conv1D": Kind(
        "gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa", "fan_in_fan_out": True}, SMALL
    ),
    "PiSSA and DoRA": Kind("qwen3", {"target_modules": LINEAR, "init_lora_weights": "pissa", "use_dora": True}, SMALL),
    "OLoRA": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "olora"}, is_slow=False),
    "OLoRA, rank-stabilised": Kind(
        "qwen2", {"target_modules": LINEAR, "init_lora_weights": "olora", "use_rslora": True}
    ),
    "EVA's start": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "eva"}),
    "orthogonal": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "MiCA": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "Gaussian": Kind("llama", {"target_modules": LINEAR, "init_lora_weights": "gaussian"}),
    "VeLoRA": Kind("llama", {"target_modules": LINEAR, "velora_config": peft.tuners.lora.config.VeloraConfig()}),
    "Monte Carlo LoRA": Kind(
        "llama", {"target_modules": LINEAR, "monteclora_config": peft.tuners.lora.config.MontecloraConfig()}
    ),
    "trained tokens": Kind("llama", {"target_modules": LINEAR, "trainable_token_indices": [3, 70, 5]}, is_slow=False),
    "trained tokens of a tied embedding": Kind(
        "qwen3",
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [90, 1]}},
        {"tie_word_embeddings": True},
        is_slow=False,
    ),
    "trained tokens of the head": Kind(
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2, 4], "embed_tokens": [9]}}
    ),
    "trained tokens of GPT-2": Kind(
        "gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [2, 4]}, "fan_in_fan_out": True}
    ),
    "biases of LoRA": Kind("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, is_slow=False),
    "biases of LoRA on Conv1D": Kind(
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True, "fan_in_fan_out": True}
    ),
    "biases of LoRA that the base lacks": Kind(
        "llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}, is_slow=False
    ),
    "all biases": Kind("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "head trained, tied": Kind(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}
    ),
    "embedding trained, tied": Kind(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}
    ),
    "both trained, tied": Kind(
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"tie_word_embeddings": True},
    ),
    "LoRA on GPT-2's tied head": Kind(
        "gpt2", {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True}, {"tie_word_embeddings": True}
    ),
    "LoRA on GPT-2's tied embedding": Kind(
        "gpt2", {"target_modules": ["wte"], "fan_in_fan_out": True}, {"tie_word_embeddings": True}
    ),
    "everything linear of Mixtral": Kind("mixtral", {"target_modules": "all-linear"}, EXPERTS, is_slow=False),
    "everything linear of Qwen 3 MoE": Kind("qwen3_moe", {"target_modules": "all-linear"}, EXPERTS, is_slow=False),
    "everything linear of OLMoE": Kind("olmoe", {"target_modules": "all-linear"}, EXPERTS),
    "everything linear of DeepSeek V3": Kind("deepseek_v3", {"target_modules": "all-linear"}, EXPERTS | DEEPSEEK),
    "everything linear of Qwen 2 MoE": Kind("qwen2_moe", {"target_modules": "all-linear"}, EXPERTS),
    "experts and router of PhiMoE": Kind(
        "phimoe", {"target_modules": ["q_proj"], "target_parameters": [*FUSED, "router.weight"]}, EXPERTS
    ),
    "experts stored in one weight": Kind(
        "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": FUSED}, EXPERTS | {"head_dim": 8}, is_slow=False
    ),
    "square experts stored in one weight": Kind(
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": FUSED},
        EXPERTS | {"head_dim": 8, "intermediate_size": 32},
        is_slow=False,
    ),
    "square experts of Llama 4": Kind(
        "llama4_text",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        EXPERTS | {"head_dim": 8, "intermediate_size": 32},
    ),
    "biases of experts": Kind(
        "gpt_oss",
        {"target_modules": [], "target_parameters": [*FUSED, "gate_up_proj_bias", "router.weight"]},
        EXPERTS | {"head_dim": 8},
    ),
    "experts under other names": Kind(
        "granitemoe", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}, EXPERTS
    ),
    "a router under another name": Kind(
        "granitemoe", {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]}, EXPERTS, is_slow=False
    ),
    "a router of OLMoE": Kind("olmoe", {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}, EXPERTS),
    "a router of Qwen 2": Kind(
        "qwen2_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, EXPERTS
    ),
    "routers of DeepSeek V3": Kind(
        "deepseek_v3", {"target_modules": ["q_b_proj"], "target_parameters": ["gate.weight"]}, EXPERTS | DEEPSEEK
    ),
    "layers stored in one weight": Kind(
        "hrm_text", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}}, RECURRENT, is_slow=False
    ),
    "some of the layers stored in one weight": Kind("hrm_text", {"target_modules": ["up_proj", "v_proj"]}, RECURRENT),
    "half of the experts": Kind("qwen3_moe", {"target_modules": [], "target_parameters": FUSED[1:]}, EXPERTS),
    "experts, rank-stabilised, ranks and alphas by pattern": Kind(
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": FUSED,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, "q_proj": 3},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
        },
        EXPERTS,
    ),
}


def make_adapter(root: Path, kind: Kind, tiny_model: Callable[..., Any]) -> None:
    """Write ``base`` and ``adapter``: every trained weight differs from its start."""
    tiny_model(kind.family, root / "base", **kind.base)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(load(root / "base"), peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **kind.options}))
    change(adapted)
    adapted.save_pretrained(root / "adapter")


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "VeRA": (lambda: peft.VeraConfig(r=8, **ATTENTION), "VeRA"),
    "LoHa": (lambda: peft.LoHaConfig(**ATTENTION), "LoHa"),
    "LoKr": (lambda: peft.LoKrConfig(**ATTENTION), "LoKr"),
    "IA3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "(IA)³"),
    "OFT": (lambda: peft.OFTConfig(**ATTENTION), "OFT"),
    "BOFT": (lambda: peft.BOFTConfig(boft_block_size=4, **ATTENTION), "BOFT"),
    "HRA": (lambda: peft.HRAConfig(**ATTENTION), "HRA"),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(total_step=10, **ATTENTION), "AdaLoRA"),
    "FourierFT": (lambda: peft.FourierFTConfig(n_frequency=10, **ATTENTION), "FourierFT"),
    "VB-LoRA": (lambda: peft.VBLoRAConfig(vector_length=16, num_vectors=8, topk=2, **ATTENTION), "VB-LoRA"),
    "LayerNorm tuning": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "LayerNorm tuning"),
    "trainable tokens alone": (
        lambda: peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
        "trainable tokens",
    ),
    "prompt tuning": (lambda: peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4), "prompt tuning"),
    "prefix tuning": (lambda: peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=4), "prefix tuning"),
    "P-tuning": (lambda: peft.PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=4), "P-tuning"),
    "PiSSA by fast decomposition": (
        lambda: peft.LoraConfig(init_lora_weights="pissa_niter_4", **ATTENTION),
        "fast decomposition",
    ),
    "KaSA": (lambda: peft.LoraConfig(kasa_config=peft.tuners.lora.config.KasaConfig(), **ATTENTION), "KaSA"),
    "replicated layers": (
        lambda: peft.LoraConfig(layer_replication=[[0, 2], [1, 2]], **ATTENTION),
        "replicated layers",
    ),
    "aLoRA": (lambda: peft.LoraConfig("CAUSAL_LM", alora_invocation_tokens=[1, 2], **ATTENTION), "aLoRA"),
    "a classifier": (lambda: peft.LoraConfig("SEQ_CLS", **ATTENTION), "a classifier"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_saves_of_other_methods_is_refused_by_name(
    name: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    make, words = REFUSED[name]
    model = tiny_model("llama", hidden_size=64)
    if name == "a classifier":
        model = transformers.AutoModelForSequenceClassification.from_config(model.config)
    peft.get_peft_model(model, make()).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    assert words in caught.value.cause


@pytest.mark.parametrize(
    ("family", "module", "leaves"),
    [
        ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"]),
        pytest.param("qwen3_moe", "mlp", ["gate_proj", "up_proj", "down_proj"], marks=pytest.mark.slow),
        pytest.param("mixtral", "block_sparse_moe", ["w2"], marks=pytest.mark.slow),
    ],
)
def test_experts_one_by_one_as_in_transformers_4(
    family: str, module: str, leaves: list[str], tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    tiny_model(family, tmp_path / "base", **EXPERTS)
    base = load_file(tmp_path / "base" / "model.safetensors")
    torch.manual_seed(7)
    tensors = {}
    for name, weight in base.items():
        if f"{module}.experts." in name and name.split(".")[-2] in leaves:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1])
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.05
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=leaves, base_model_name_or_path="a/b")
    config.save_pretrained(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert largest_difference(tmp_path) < TOLERANCE


@pytest.mark.slow
def test_the_language_model_of_a_composite_model(tmp_path: Path) -> None:
    """The modules of such a model have another prefix than its files."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.Gemma3TextConfig(
        **sizes, vocab_size=96, head_dim=16, num_key_value_heads=1, initializer_range=0.2
    )
    vision = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95
    )
    library = transformers.AutoModelForImageTextToText
    torch.manual_seed(5)
    library.from_config(config).save_pretrained(tmp_path / "base")
    targets = r".*language_model.*\.(q_proj|down_proj)"
    adapted = peft.get_peft_model(
        library.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, target_modules=targets)
    )
    change(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    ids = torch.arange(3, 60)[None]
    base, merged = (library.from_pretrained(tmp_path / name).eval() for name in ("base", "merged"))
    with torch.no_grad():
        result, expected, before = merged(ids).logits, adapted.eval()(input_ids=ids).logits, base(ids).logits
    assert (before - expected).abs().max() > 100 * TOLERANCE
    assert (result - expected).abs().max() < TOLERANCE


TRAINED_BOTH = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({"target_modules": ["q_proj"]}, False),
        pytest.param({"target_modules": ["q_proj"]}, True, marks=pytest.mark.slow),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 99]}, True),
        pytest.param({"target_modules": ["q_proj"], "trainable_token_indices": [5, 99]}, False, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, True, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, True, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": TRAINED_BOTH}, True, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": TRAINED_BOTH}, False, marks=pytest.mark.slow),
    ],
)
def test_a_vocabulary_with_new_tokens(
    options: dict[str, Any], is_tied: bool, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    tiny_model("llama", tmp_path / "base", tie_word_embeddings=is_tied)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(resized(tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=10, **options))
    change(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    expected = peft.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "adapter").eval()
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == 104 == len(merged.get_output_embeddings().weight)
    ids = torch.arange(104)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_new_tokens_without_the_others(is_tied: bool, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """The base has no such rows yet; some of them alone would leave others without values."""
    tiny_model("llama", tmp_path / "base", tie_word_embeddings=is_tied)
    modules = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    for tokens in (list(range(96, 104)), [97, 103]):
        folder = tmp_path / f"adapter of {len(tokens)}"
        config = peft.LoraConfig(
            r=4, lora_alpha=10, target_modules=["q_proj"], trainable_token_indices={name: tokens for name in modules}
        )
        adapted = peft.get_peft_model(resized(tmp_path / "base"), config)
        change(adapted)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    merge_into(tmp_path / "adapter of 8", tmp_path / "base", tmp_path / "merged")
    expected = peft.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "adapter of 8").eval()
    merged, ids = load(tmp_path / "merged"), torch.arange(104)[None]
    assert merged.config.vocab_size == 104 == len(merged.get_output_embeddings().weight)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, atol=TOLERANCE, rtol=0)
    with pytest.raises(ArtifactError, match="some of the base model's new tokens only"):
        MergedModel(tmp_path / "adapter of 2", tmp_path / "base", "fp32")


def test_new_tokens_without_their_embeddings(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """PEFT leaves the embeddings out when it can't find the base's config."""
    make_adapter(tmp_path, KINDS["plain"], tiny_model)
    tokens = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 95}}, "added_tokens": [{"id": 96, "content": "<new>"}]}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_text(json.dumps(tokens), encoding="utf-8")
    assert tokenizer_folder(tmp_path / "adapter", tmp_path / "base") == tmp_path / "adapter"
    model = MergedModel(tmp_path / "adapter", tmp_path / "base", "fp32")
    with pytest.raises(ArtifactError, match="97 tokens, the model embeddings of 96") as caught:
        model.check_tokenizer(tmp_path / "adapter")
    assert "save_embedding_layers" in caught.value.hint


def test_only_one_of_embedding_and_head_has_new_tokens(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    make_adapter(tmp_path, KINDS["plain"], tiny_model)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": torch.randn(104, 64)}, file)
    with pytest.raises(ArtifactError, match="has not both") as caught:
        MergedModel(tmp_path / "adapter", tmp_path / "base", "fp32")
    assert "save_embedding_layers" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "family", "options", "words"),
    [
        ("a bias that has no place", "qwen3", {"target_modules": ["q_proj"], "lora_bias": True}, "no place for a bias"),
        ("OLoRA on Conv1D", "gpt2", {"target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}, "OLoRA"),
        (
            "DoRA on layers in one weight",
            "hrm_text",
            {"target_modules": ["up_proj"], "use_dora": True},
            "no plain LoRA",
        ),
        ("PiSSA on a tied head", "llama", {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "tied head"),
    ],
)
def test_what_has_no_merged_form(
    name: str, family: str, options: dict[str, Any], words: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    del name
    make_adapter(tmp_path, Kind(family, options, {"tie_word_embeddings": True}), tiny_model)
    with pytest.raises(ModelError) as caught:
        MergedModel(tmp_path / "adapter", tmp_path / "base", "fp32")
    assert words in f"{caught.value.cause} {caught.value.hint}"


def resized(base: Path) -> Any:
    """Return the model with 8 more tokens, whose embeddings the adapter has."""
    model = load(base)
    model.resize_token_embeddings(104, mean_resizing=False)
    return model


def change(adapted: Any) -> None:
    """Change every trained weight a little."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def merge_into(adapter: Path, base: Path, target: Path) -> dict[str, Any]:
    target.mkdir()
    return merge.merge_adapter(adapter, base, target, tokenizer=base, dtype="fp32", reporter=PlainReporter())


def largest_difference(root: Path) -> float:
    """Return how far the logits of the merged model are from those of PEFT's own model."""
    adapted = peft.PeftModel.from_pretrained(load(root / "base"), root / "adapter").eval()
    merged, loading = transformers.AutoModelForCausalLM.from_pretrained(root / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    size = min(merged.get_input_embeddings().weight.shape[0], adapted.get_input_embeddings().weight.shape[0])
    ids = torch.arange(size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))][None, :64]
    with torch.no_grad():
        expected, result = adapted(ids).logits, merged.eval()(ids).logits
        base = load(root / "base")(ids.clamp(max=expected.shape[-1] - 1)).logits
    assert (expected[..., : base.shape[-1]] - base).abs().max() > 100 * TOLERANCE, "the adapter changes nothing"
    return float((result - expected).abs().max())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if kind.is_slow else []) for name, kind in KINDS.items()]
)
def test_the_merged_model_computes_what_peft_computes(
    name: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    make_adapter(tmp_path, KINDS[name], tiny_model)
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert largest_difference(tmp_path) < TOLERANCE
