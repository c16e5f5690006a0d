"""Prove for each architecture that transformers and llama.cpp's converter share what becomes of it.

    python tools/architectures.py [--table docs/architectures.md] [NAME ...]

For each type of model a tiny one with random weights is made, and computed by transformers and by llama.cpp. Where they
agree, it is trained for a few steps by kolotune's own engine, merged, converted in f32, and compared with the adapter
on its base. Each is done in a process of its own, which llama.cpp may end. `--table` writes the table in the docs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EQUAL = 1e-6
"""Mean KL up to which a tuned model is equal to the adapter on its base."""
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
CHANGES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.448, "mup_enabled": True},
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 64},
    "bitnet": {"tie_word_embeddings": True},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": None, "topk_group": None},
    "deepseek_v32": _SIGMOID,
    "deepseek_v4": {"num_hash_layers": 3},
    "dots1": {
        "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    },
    "dots3_note": _SIGMOID,
    "dots3_note_text": _SIGMOID,
    "exaone4": {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 32},
    "exaone_moe": _SIGMOID,
    "falcon_h1": {"head_dim": 128},
    "glm4_moe_lite": {**_SIGMOID, "first_k_dense_replace": 1},
    "glm_moe_dsa": _SIGMOID,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {
        "head_dim": 128, "num_experts": 8, "moe_topk": [2] * 32, "moe_intermediate_size": [11008] * 32,
        "num_shared_expert": [1] * 32,
    },
    "lfm2": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "minicpm3": {"scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4},
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid"},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen3_moe": {"norm_topk_prob": True},
    "solar_open": {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0},
}  # fmt: skip
"""Settings of published models where transformers' defaults are those of none."""
_PASSED = b" "
_BEGIN, _END = "<!-- table -->", "<!-- end of the table -->"


class Outcome(StrEnum):
    """What becomes of a model."""

    EQUAL = "tuned and equal"
    REFUSED = "refused before preparing"
    WARNED = "trained with a warning"
    IMPOSSIBLE = "not possible"
    FAILED = "failed"


@dataclass(frozen=True)
class Row:
    """One type of model.

    Attributes:
        model_type, architecture: transformers' names.
        outcome: what became of it.
        divergence: mean KL of the tuned GGUF to the adapter on its base; None: not trained.
        reached: share of the base's weights, outside embedding and head, that adapters reach; None: not trained.
        reason: why it is not equal.
    """

    model_type: str
    architecture: str
    outcome: Outcome
    divergence: float | None = None
    reached: float | None = None
    reason: str = ""


def shared_architectures(root: Path) -> list[tuple[str, str]]:
    """Return types of models and names of their classes that transformers and the converter in `root` share."""
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    from conversion import TEXT_MODEL_MAP  # type: ignore[import-not-found]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [(kind, name) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in TEXT_MODEL_MAP]


def tiny_config(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny model, made of transformers' defaults; `changes` are made before it is shrunk."""
    import transformers

    from kolotune.weights.shrunk_config import shrink

    config = transformers.CONFIG_MAPPING[model_type]().to_dict()
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text
    return shrink({**config, **changes, "architectures": [architecture]})


def prove(
    model_type: str, architecture: str, toolchain: Path, folder: Path, passed: Callable[[], object], **changes: Any
) -> Row:
    """Return what becomes of a type of model; `folder` is new, `passed` is called before it is trained."""
    from kolotune.fidelity import computation_gate, computation_proof
    from kolotune.fidelity.computation_gate import Verdict
    from kolotune.foundation import typed_storage
    from kolotune.weights.model_config import ModelConfig

    folder.mkdir(parents=True)
    try:
        config = ModelConfig(folder, tiny_config(model_type, architecture, **changes))
    except Exception as error:  # transformers' defaults for a type may contradict each other
        return Row(model_type, architecture, Outcome.IMPOSSIBLE, reason=f"transformers: {error}")
    task, answer = folder / "task.json", folder / "answer.json"
    typed_storage.write(task, computation_proof.ComputationTask(config.values, str(toolchain), str(answer)))
    computation_proof.measure(task)
    proof = typed_storage.read(computation_proof.ComputationProof, answer)
    verdict, sentence = computation_gate.judge(proof, config), computation_gate.describe(proof, config)
    if verdict in (Verdict.DIFFERENT, Verdict.NOT_COMPUTED, Verdict.NOT_MERGED, Verdict.NOT_COMPARED):
        impossible = proof.obstacle is computation_proof.FailedSide.TRANSFORMERS
        outcome = Outcome.IMPOSSIBLE if impossible else Outcome.REFUSED
        return Row(model_type, architecture, outcome, reason=sentence)
    passed()
    divergence, reached = train_and_compare(config, toolchain, folder / "run", long=verdict is not Verdict.LONG_CHATS)
    outcome = Outcome.EQUAL if verdict is Verdict.EQUAL else Outcome.WARNED
    if divergence > EQUAL and outcome is Outcome.EQUAL:
        outcome, sentence = Outcome.FAILED, "the tuned model differs"
    return Row(model_type, architecture, outcome, divergence, reached, sentence)


def train_and_compare(config: Any, toolchain: Path, folder: Path, *, long: bool) -> tuple[float, float]:
    """Train, merge and convert a tiny model; return the mean KL and the share of weights that adapters reach."""
    import contextlib

    import numpy as np
    from safetensors import safe_open

    from kolotune.engines.native import training
    from kolotune.fidelity import divergence
    from kolotune.fidelity.reference_model import WholeModel
    from kolotune.fidelity.tasks import ComparedChat
    from kolotune.fidelity.tiny_model import write_tiny_model
    from kolotune.foundation.reporter import PlainReporter
    from kolotune.gguf.tiny_conversion import convert_without_tokenizer
    from kolotune.llamacpp.evaluation import ExactGguf
    from kolotune.weights.merge import MergedModel
    from kolotune.weights.shards import split_into_shards, write_shards
    from kolotune.weights.shrunk_config import VOCABULARY, WINDOW

    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    write_tiny_model(config.values, base)
    training.train(_job(folder, base, adapter))
    model = MergedModel(adapter, base, "fp32")
    merged.mkdir()
    (merged / "config.json").write_text(model.config_text(), encoding="utf-8")
    shards = split_into_shards(model.entries)
    model.write(lambda: write_shards(merged, shards, model.blocks), PlainReporter())
    gguf = merged / "Merged.gguf"
    convert_without_tokenizer(toolchain, merged, gguf)
    length = 4 * WINDOW if long else WINDOW
    ids = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    reference = WholeModel(base)
    reference.add(adapter)
    ((_, before),) = reference.log_probabilities([ComparedChat(ids, list(range(length)), [])])
    with contextlib.closing(ExactGguf(gguf, length)) as read:
        after = read.log_probabilities(ids, range(length))
    with safe_open(adapter / "adapter_model.safetensors", "np") as tensors:
        names = {name.split(".lora_")[0] for name in tensors.keys()}  # noqa: SIM118 - not a dictionary
    return divergence.between(before, after).kl_mean, float(len(names))


def _job(folder: Path, base: Path, adapter: Path) -> Any:
    from kolotune.engines.job import TrainJob
    from kolotune.run_folder.layout import TRAIN_TOKENS
    from kolotune.weights.model_shape import read_shape

    data = folder / "prepared"
    _write_tokens(data / TRAIN_TOKENS)
    paths = {
        "base_model": base,
        "data": data,
        "adapter": adapter,
        "checkpoints": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
    }
    return TrainJob(
        **{name: str(path) for name, path in paths.items()},
        base_name="tiny",
        base_sha256="",
        data_sha256="",
        resume=False,
        nproc=1,
        nnodes=1,
        rdzv=None,
        sharded=False,
        dtype="fp32",
        compile=False,
        load_in_4bit=False,
        epochs=1,
        learning_rate=1e-2,
        scheduler_type="constant",
        warmup_steps=None,
        weight_decay=0.0,
        batch_size=2,
        gradient_accumulation=1,
        max_grad_norm=1.0,
        seed=1,
        lora_rank=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
        target_modules=["all-linear"],
        target_parameters=["all-experts"] if read_shape(base).experts else [],
        early_stopping=0,
        checkpoint_steps=0,
    )


def _write_tokens(path: Path, chats: int = 4, length: int = 20) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True)
    arrays = {
        "ids": np.random.default_rng(2).integers(3, 500, chats * length).astype(np.int32),
        "labelled": np.tile(np.arange(length) >= length // 2, chats).astype(np.uint8),
        "offsets": np.arange(chats + 1, dtype=np.int64) * length,
    }
    save_file(arrays, path)


def _in_process(model_type: str, architecture: str, toolchain: Path) -> Row:
    """Prove a row in a process that may die; it has all modules already."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                row = prove(
                    model_type,
                    architecture,
                    toolchain,
                    Path(folder) / "row",
                    lambda: os.write(sender, _PASSED),
                    **CHANGES.get(model_type, {}),
                )
        except BaseException as error:  # whatever it is, it is the row's
            row = Row(model_type, architecture, Outcome.FAILED, reason=f"{type(error).__name__}: {error}"[:300])
        os.write(sender, json.dumps(asdict(row)).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if not answer.strip():
        outcome = Outcome.FAILED if answer == _PASSED else Outcome.REFUSED
        return Row(model_type, architecture, outcome, reason=f"llama.cpp ends the process with signal {status & 127}")
    values = json.loads(answer)
    return Row(**{**values, "outcome": Outcome(values["outcome"])})


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| class | type | verdict | KL | adapters | what differs, or why |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.0e}"
        reached = "" if row.reached is None else f"{row.reached:g}"
        reason = " ".join(row.reason.split()).replace("|", "\\|")
        yield f"| {row.architecture} | {row.model_type} | {row.outcome} | {divergence} | {reached} | {reason} |"


def main() -> int:
    """Prove all rows, or those named; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="file whose table is written")
    parser.add_argument("names", nargs="*", metavar="NAME", help="types of models; default: all")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401 - once for all rows

    from kolotune import llamacpp
    from kolotune.foundation.reporter import PlainReporter

    torch.set_num_threads(1)
    toolchain = llamacpp.ensure(PlainReporter()).root
    rows = []
    shared = dict(shared_architectures(toolchain))
    for model_type in arguments.names or shared:
        rows.append(_in_process(model_type, shared[model_type], toolchain))
        print(json.dumps(asdict(rows[-1])), flush=True)
    if arguments.table:
        text = arguments.table.read_text(encoding="utf-8")
        before, _, rest = text.partition(_BEGIN)
        body = "\n".join(_table(rows))
        arguments.table.write_text(f"{before}{_BEGIN}\n{body}\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    return int(any(row.outcome is Outcome.FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
