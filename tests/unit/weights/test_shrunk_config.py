"""The settings of tiny models."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.weights.shrunk_config import VOCABULARY, WINDOW, reach, shrink

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "pad_token_id": None,
    "transformers_version": "5.23.0",
}


def test_the_rules_stay_and_the_widths_shrink() -> None:
    shrunk = shrink(LLAMA)
    assert shrunk == {
        **{name: LLAMA[name] for name in ("rms_norm_eps", "rope_theta")},
        "num_hidden_layers": 2,
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "pad_token_id": None,
    }


@pytest.mark.parametrize(
    ("heads", "keys", "expected"), [(32, 32, (2, 2)), (71, 1, (2, 1)), (16, 4, (4, 2)), (1, 1, (1, 1))]
)
def test_heads_share_keys_as_before(heads: int, keys: int, expected: tuple[int, int]) -> None:
    shrunk = shrink({"hidden_size": 64 * heads, "num_attention_heads": heads, "num_key_value_heads": keys})
    assert (shrunk["num_attention_heads"], shrunk["num_key_value_heads"]) == expected
    assert shrunk["hidden_size"] == 64 * expected[0], "heads are as wide as before"


def test_heads_that_are_wider_than_the_layer_stay_so() -> None:
    shrunk = shrink({"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128})
    assert shrunk["head_dim"] == 128 and shrunk["hidden_size"] < 128 * shrunk["num_attention_heads"]


def test_experts_windows_and_lists() -> None:
    shrunk = shrink(
        {
            "hidden_size": 1024,
            "num_local_experts": 64,
            "num_experts_per_tok": 8,
            "sliding_window": 4096,
            "intermediate_size": [4096, 8192],
            "layer_types": ["full_attention", "sliding_attention"],
        }
    )
    assert shrunk["num_local_experts"] == 8 and shrunk["num_experts_per_tok"] == 2
    assert shrunk["sliding_window"] == WINDOW and len(shrunk["intermediate_size"]) == 2
    assert shrunk["layer_types"] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"sliding_window": None, "max_position_embeddings": 2048}, None),
        ({"sliding_window": 4096}, 4096),
        ({"index_topk": 2048}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048}, 2048),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 64, "sliding_window": 32}, 32),
        ({"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 2048}, None),
    ],
    ids=["empty", "none", "window", "chosen keys", "dynamic", "both", "yarn"],
)
def test_reach(config: dict[str, Any], expected: int | None) -> None:
    assert reach(config) == expected
    if expected is not None:
        assert reach(shrink(config)) == WINDOW


def test_the_first_layers_have_one_of_each_kind() -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    shrunk = shrink({"num_hidden_layers": 30, "layer_types": kinds, "per_layer_config": {"5": {}, "11": {}}})
    assert shrunk["num_hidden_layers"] == 6 and shrunk["layer_types"] == kinds[:6]
    assert shrunk["per_layer_config"] == {"5": {}}
    assert shrink({"num_hidden_layers": 61, "first_k_dense_replace": 3})["num_hidden_layers"] == 4
    assert shrink({"num_hidden_layers": 64, "model_type": "exaone4"})["num_hidden_layers"] == 64


def test_multiples_of_the_width_stay_multiples() -> None:
    shrunk = shrink({"hidden_size": 4544, "num_attention_heads": 71, "ffn_hidden_size": 4 * 4544, "num_kv_heads": 1})
    assert shrunk["ffn_hidden_size"] == 4 * shrunk["hidden_size"]


def test_factors_that_llamacpp_has_as_numbers_stay() -> None:
    """MiniCPM 3's width of the head, and the width of Gemma 3n's embeddings of layers."""
    shrunk = shrink({"hidden_size": 2560, "num_attention_heads": 40, "dim_model_base": 256})
    assert shrunk["dim_model_base"] == 256
    assert shrink({"hidden_size": 2048, "hidden_size_per_layer_input": 256})["hidden_size_per_layer_input"] == 256


def test_ernie_s_shared_experts_keep_their_part_of_the_width() -> None:
    shared = {"num_key_value_heads": 4, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2}
    shrunk = shrink({"hidden_size": 2560, "num_attention_heads": 20, "intermediate_size": 12288, **shared})
    width = shrunk["moe_intermediate_size"] * 2
    assert shrunk["intermediate_size"] // shrunk["num_key_value_heads"] == width


def test_stacks_of_layers() -> None:
    shrunk = shrink({"num_hidden_layers": 128, "num_layers_per_stack": 16, "H_cycles": 2, "L_cycles": 3})
    assert shrunk["num_layers_per_stack"] == shrunk["num_hidden_layers"] == 2
