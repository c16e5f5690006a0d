"""Make run folders whose models compute what a finished run's do, with other weights, for `quantization.py`.

    python bench/model_variants.py RUN OUT moved|wider

The run's base and its merged model are changed alike, and the merged one is converted. Both are of Llama's kind.

- moved: each two neighbours of the hidden states are turned by a random angle, so that no weight stands on the base's
  quantization grid. Norms are folded into the matrices behind them, and the head is untied, since the last norm is
  folded into it.
- wider: 768 hidden states and heads for as many columns, of zeros, so that rows are whole superblocks and k-quants are
  used everywhere. Norms are rescaled, since their mean is over more columns.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import convert
from kolotune.pipeline.context import open_context
from kolotune.run_folder.layout import RunFolder
from kolotune.weights.weight_files import weight_files

Weights = dict[str, Tensor]
WIDTH = 768
READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITING = ("o_proj", "down_proj")
FIRST_NORM, SECOND_NORM, LAST_NORM = "input_layernorm", "post_attention_layernorm", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def kind_of(name: str) -> str:
    """Return the module that a weight belongs to."""
    return name.split(".")[-2]


def moved(weights: Weights, config: dict[str, Any]) -> Weights:
    """Turn neighbouring hidden states; change the config to that of the result."""
    config["tie_word_embeddings"] = False
    angles = torch.rand(config["hidden_size"] // 2, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    sine, cosine = angles.sin(), angles.cos()

    def turned(states: Tensor) -> Tensor:
        first, second = states[..., ::2], states[..., 1::2]
        return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)

    result = {EMBEDDING: turned(weights[EMBEDDING])}
    result[HEAD] = turned(weights.get(HEAD, weights[EMBEDDING]) * weights[LAST_NORM])
    for name, weight in weights.items():
        layer, kind = name.split("self_attn")[0].split("mlp")[0], kind_of(name)
        if kind in READING:
            norm = FIRST_NORM if "self_attn" in name else SECOND_NORM
            result[name] = turned(weight * weights[f"{layer}{norm}.weight"])
        elif kind in WRITING:
            result[name] = turned(weight.T).T
        elif name not in (EMBEDDING, HEAD):
            assert "norm" in kind, name
            result[name] = torch.ones_like(weight)
    return result


def wider(weights: Weights, config: dict[str, Any]) -> Weights:
    """Add zeros to the hidden states and to the heads; change the config to that of the result."""
    hidden, depth, keys = config["hidden_size"], config["head_dim"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // keys
    more_keys = (WIDTH - group * keys * depth) // (group * depth)
    queries = group * (keys + more_keys)
    config |= {"hidden_size": WIDTH, "num_key_value_heads": keys + more_keys, "num_attention_heads": queries}
    config["rms_norm_eps"] *= hidden / WIDTH
    rows = {"q_proj": more_keys * group * depth, "k_proj": more_keys * depth, "v_proj": more_keys * depth}
    result = {}
    for name, weight in weights.items():
        kind = kind_of(name)
        if "norm" in kind:
            weight = pad(weight * (hidden / WIDTH) ** 0.5, (0, WIDTH - hidden), value=1.0)
        elif kind == "o_proj":
            weight = pad(weight, (0, queries * depth - weight.shape[1], 0, WIDTH - hidden))
        elif kind == "down_proj":
            weight = pad(weight, (0, 0, 0, WIDTH - hidden))
        else:
            weight = pad(weight, (0, WIDTH - hidden, 0, rows.get(kind, 0)))
        result[name] = weight
    return result


VARIANTS: dict[str, Callable[[Weights, dict[str, Any]], Weights]] = {"moved": moved, "wider": wider}


def write_variant(source: Path, target: Path, variant: str) -> None:
    """Write a variant of a model folder, in f16."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    weights: Weights = {}
    for file in weight_files(source):
        weights |= {name: weight.float() for name, weight in load_file(file).items()}
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, target)
    changed = VARIANTS[variant](weights, config)
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float16"}), encoding="utf-8")
    save_file({name: weight.half().contiguous() for name, weight in changed.items()}, target / "model.safetensors")


def main() -> None:
    """Make a run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variant", choices=VARIANTS)
    options = parser.parse_args()
    run, out = RunFolder(options.run.absolute()), RunFolder(options.out.absolute())
    base = open_context(run).base
    out.prepared.parent.mkdir(parents=True)
    shutil.copytree(run.prepared, out.prepared)
    write_variant(base, out.root / "base", options.variant)
    write_variant(run.merged_model, out.merged_model, options.variant)
    saved = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    saved |= {"base_model": str(out.root / "base"), "output_dir": str(out.root)}
    out.config.write_text(yaml.safe_dump(saved), encoding="utf-8")
    convert.convert_folder(out.merged_model, out.gguf, out.state / "log", PlainReporter(), exact=False)


if __name__ == "__main__":
    main()
