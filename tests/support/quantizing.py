"""Tiny GGUFs with random weights, whose tensors have the names and traits that decide about their quantization."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import writer_form
from kolotune.gguf.header import GgufSummary
from kolotune.gguf.tensor_types import tensor_types

_CHOICES = Path(__file__).with_name("quantized_by_llamacpp.json")

VOCABULARY = 8
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_FUSED = ("attn_qkv", "attn_output")
_GATED, _PLAIN = ("ffn_gate", "ffn_up", "ffn_down"), ("ffn_up", "ffn_down")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class TinyModel:
    """A model of one architecture.

    Attributes:
        architecture: llama.cpp's name for it.
        columns: of most matrices.
        layers: how many.
        heads, key_heads: in all layers, or in each.
        matrices: names of the matrices of a layer.
        experts: matrices of each weight of experts.
        is_tied: whether there is no output matrix.
        more: other tensors and their shapes, slowest dimension first.
        fields: of the header, without the architecture in front.
    """

    architecture: str = "llama"
    columns: int = 256
    layers: int = 2
    heads: int | tuple[int, ...] = 4
    key_heads: int | tuple[int, ...] = 4
    matrices: tuple[str, ...] = _ATTENTION + _GATED
    experts: int = 0
    is_tied: bool = False
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor."""
        yield "token_embd.weight", (VOCABULARY, self.columns)
        yield "output_norm.weight", (self.columns,)
        if not self.is_tied:
            yield "output.weight", (VOCABULARY, self.columns)
        for layer in range(self.layers):
            yield f"blk.{layer}.attn_norm.weight", (self.columns,)
            for name in self.matrices:
                stack = (self.experts,) if name.endswith(("_exps", "_k_b", "_v_b")) else ()
                yield f"blk.{layer}.{name}.weight", (*stack, 3, self.columns)
        yield from self.more.items()

    def write(self, path: Path, gguf_type: str, seed: int = 0) -> Path:
        """Write it with random weights, matrices as "f16", "bf16" or "f32", in the form of llama.cpp's writer."""
        import gguf

        writer, random = gguf.GGUFWriter(path, self.architecture), np.random.default_rng(seed)
        for name, value in {**self._common_fields(), **self.fields}.items():
            _add_field(writer, f"{self.architecture}.{name}", value)
        for name, shape in self.shapes():
            values = random.standard_normal(shape, np.float32)
            if len(shape) == 1 or gguf_type == "f32":
                writer.add_tensor(name, values)
            elif gguf_type == "f16":
                writer.add_tensor(name, values.astype(np.float16))
            else:
                bits = (values.view(np.uint32) >> 16).astype(np.uint16)
                writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer_form.arrange(writer, gguf_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def importance(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random importances of the columns of the layers' matrices."""
        random = np.random.default_rng(seed)
        return {
            name: random.lognormal(0, 1, shape[-1] * (shape[0] if len(shape) > 2 else 1)).astype(np.float32)
            for name, shape in self.shapes()
            if "blk." in name and len(shape) > 1
        }

    def _common_fields(self) -> dict[str, Any]:
        heads = self.heads if isinstance(self.heads, int) else self.heads[0]
        common: dict[str, Any] = {
            "block_count": self.layers, "context_length": 64, "embedding_length": self.columns,
            "feed_forward_length": self.columns, "attention.head_count": self.heads,
            "attention.head_count_kv": self.key_heads, "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": self.columns // max(1, heads),
            "vocab_size": VOCABULARY,
        }  # fmt: skip
        experts = {"expert_count": self.experts, "expert_used_count": 2, "expert_feed_forward_length": self.columns}
        return common | (experts if self.experts else {})


def _add_field(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, tuple):
        writer.add_array(name, list(value))
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


_LATENT = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_kv_b", "attn_output")
_LATENT_SIZES = {
    "attention.key_length_mla": 64, "attention.value_length_mla": 64, "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64, "expert_shared_count": 1, "leading_dense_block_count": 0, "expert_gating_func": 2,
}  # fmt: skip
_RECURRENT = (
    "time_mix_w0", "time_mix_w1", "time_mix_w2", "time_mix_a0", "time_mix_g1", "time_mix_g2", "time_mix_lerp_fused",
    "time_mix_key", "time_mix_value", "channel_mix_key",
)  # fmt: skip

MODELS: dict[str, TinyModel] = {
    "llama": TinyModel(layers=18),
    "llama, tied, shared keys": TinyModel(layers=9, heads=8, key_heads=2, is_tied=True),
    "llama of 65B": TinyModel(layers=80),
    "llama of 70B": TinyModel(layers=80, heads=8, key_heads=2),
    "heads by layer": TinyModel("deci", layers=70, heads=(8,) + (4,) * 69, key_heads=(2,) + (4,) * 69),
    "576 columns": TinyModel(columns=576, layers=3, heads=9, key_heads=3, is_tied=True),
    "100 columns": TinyModel(columns=100),
    "8 experts": TinyModel(layers=9, matrices=(*_ATTENTION, *_EXPERTS, "ffn_gate_inp"), experts=8),
    "4 experts and one for all": TinyModel(
        "qwen3moe", layers=8, matrices=(*_ATTENTION, *_EXPERTS, "ffn_gate_inp", "ffn_down_shexp"), experts=4
    ),
    "experts apart": TinyModel(
        experts=2, matrices=(*_ATTENTION, *(f"{name}.{number}" for name in _GATED for number in range(2)))
    ),
    "experts of no layer": TinyModel(experts=2, matrices=_ATTENTION, more={"dense.ffn_up.weight": (3, 256)}),
    "qwen2": TinyModel("qwen2", layers=10, is_tied=True),
    "qwen2 of 72B": TinyModel("qwen2", layers=80, heads=4, key_heads=2),
    "olmo of 70B": TinyModel("olmo", layers=80),
    "jais2 of 70B": TinyModel("jais2", layers=68),
    "gemma3": TinyModel("gemma3", layers=8, is_tied=True, fields={"attention.sliding_window": 16}),
    "gemma3n": TinyModel(
        "gemma3n",
        is_tied=True,
        matrices=(*_ATTENTION, *_GATED, "altup_router", "laurel_l", "inp_gate"),
        more={"per_layer_token_embd.weight": (VOCABULARY, 256), "per_layer_model_proj.weight": (256, 256)},
        fields={"attention.sliding_window": 16, "attention.sliding_window_pattern": (True, False)},
    ),
    "phi3": TinyModel("phi3", layers=16, matrices=_FUSED + _PLAIN),
    "falcon": TinyModel("falcon", layers=32, matrices=_FUSED + _PLAIN),
    "falcon with 8 experts": TinyModel("falcon", layers=16, matrices=(*_FUSED, *_EXPERTS), experts=8),
    "gpt2": TinyModel("gpt2", matrices=_FUSED + _PLAIN, more={"position_embd.weight": (64, 256)}),
    "bert": TinyModel("bert", is_tied=True, more={"token_types.weight": (2, 256)}),
    "t5": TinyModel(
        "t5",
        matrices=(),
        more={
            f"{part}.blk.0.{name}.weight": (3, 256)
            for part in ("enc", "dec")
            for name in ("attn_v", "cross_attn_v", "attn_rel_b", "ffn_down", "ffn_up")
        },
        fields={"attention.relative_buckets_count": 32},
    ),
    "mamba": TinyModel(
        "mamba",
        heads=0,
        key_heads=0,
        matrices=("ssm_in", "ssm_conv1d", "ssm_x", "ssm_dt", "ssm_a", "ssm_out"),
        fields={"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 16},
    ),
    "rwkv7": TinyModel(
        "rwkv7",
        heads=0,
        key_heads=0,
        matrices=_RECURRENT,
        fields={
            "wkv.head_size": 64,
            "attention.decay_lora_rank": 8,
            "attention.iclr_lora_rank": 8,
            "attention.value_residual_mix_lora_rank": 8,
        },
    ),
    "lfm2": TinyModel(
        "lfm2",
        key_heads=(0, 4),
        matrices=(*_ATTENTION, *_GATED, "shortconv.conv", "shortconv.in_proj"),
        fields={"shortconv.l_cache": 3},
    ),
    "deepseek2": TinyModel("deepseek2", layers=9, experts=4, matrices=_LATENT + _EXPERTS, fields=_LATENT_SIZES),
    "bailingmoe3": TinyModel(
        "bailingmoe3",
        experts=4,
        matrices=_LATENT + _EXPERTS,
        fields=_LATENT_SIZES
        | {"ssm.conv_kernel": 4, "kda.head_dim": 64, "kda.safe_gate": True, "kda.gate_lower_bound": -1.0},
    ),
    "glm5-next": TinyModel(
        "glm5-next",
        experts=4,
        matrices=(*_LATENT, *_EXPERTS, "nextn.eh_proj", "ssm_f_a", "indexer.attn_k", "hc_attn_fn"),
        fields=_LATENT_SIZES
        | {
            "ssm.conv_kernel": 4,
            "kda.head_dim": 64,
            "attention.indexer.head_count": 4,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 4,
            "attention.indexer.kpool": 2,
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 1,
            "hyper_connection.epsilon": 1e-5,
        },
    ),
    "nanbeige, each layer twice": TinyModel("nanbeige", layers=8, fields={"num_loops": 2}),
    "graniteswitch": TinyModel(
        "graniteswitch",
        layers=7,
        fields={
            "logit_scale": 1.0,
            "adapters.count": 1,
            "adapters.lora_rank": 4,
            "adapters.token_ids_activate": (1,),
            "adapters.token_ids_substitute": (2,),
        },
    ),
}
"""Models that the rules treat in different ways."""


def chosen_types(summary: GgufSummary) -> dict[str, dict[str, str]]:
    """Return the types that the rules give a model, in short, by the file type and whether there is a matrix."""
    cases = {}
    for file_type in FILE_TYPES:
        for ending, has_matrix in (("", False), (" with a matrix", True)):
            with contextlib.suppress(ToolchainError):
                types = described(tensor_types(summary, file_type, has_matrix=has_matrix), summary)
                if types != cases.get(file_type):
                    cases[file_type + ending] = types
    return cases


def described(types: Mapping[str, str], summary: GgufSummary) -> dict[str, str]:
    """Return the types of the quantized tensors in short: those of all layers in turn, by their names in a layer."""
    columns: dict[str, list[str]] = {}
    for name, kind in types.items():
        if kind != summary.tensors[name].type:
            columns.setdefault(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight"), []).append(kind)
    names: dict[str, list[str]] = {}
    for name, kinds in columns.items():
        runs = [(kind, len([*run])) for kind, run in itertools.groupby(kinds)]
        names.setdefault(" ".join(f"{count}*{kind}" for kind, count in runs), []).append(name)
    return {runs: " ".join(sorted(group)) for runs, group in names.items()}


@functools.cache
def recorded_choices() -> dict[str, dict[str, dict[str, str]]]:
    """Return what llama.cpp of llama-cpp-python 0.3.36 chose for `MODELS`, as `chosen_types` does."""
    choices: dict[str, dict[str, dict[str, str]]] = json.loads(_CHOICES.read_text(encoding="utf-8"))
    return choices


def matrix_and_inputs(columns: int = 256) -> tuple[Any, Any]:
    """Return weights, and inputs whose columns depend on each other, as those of real layers do."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(48, columns, generator=generator) * 0.05
    mixed = torch.randn(600, 32, generator=generator) @ torch.randn(32, columns, generator=generator) * 0.3
    return weights, mixed + 0.3 * torch.randn(600, columns, generator=generator)
