"""Training speed of each model family: kolotune's own step, and transformers with autograd, as before it had one.

    python bench/families.py [--rounds N] [--only FAMILY ...] [--models FOLDER] [--quick] [--json FILE]

Weights are random, in the shapes of published models, with fewer layers, tokens and experts, or narrower, where the
whole would take long. With --models they are written into that folder, and read from there the next time. Both steps
compute the same losses and gradients, in turns, in one process, of random chats behind a system prompt.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import Result, Table, median, options, versions

from kolotune.engines.job import TrainJob
from kolotune.engines.native.kernels import build
from kolotune.engines.native.model import PackedModel, TrainingModel, TransformersModel
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.engines.process_environment import ENVIRONMENT

_VOCABULARY, _LAYERS = 32_768, 2
_BATCH, _SYSTEM, _SHORTEST, _LONGEST = 4, 20, 30, 150
_TARGET = 2.0


@dataclass(frozen=True)
class Model:
    """A published model, of which all is kept but what its name and the number of layers and tokens say.

    Attributes:
        name: as published.
        kind: its family, as transformers calls it.
        sizes: hidden size, MLP size, query heads, key heads, width of a head.
        layers, vocabulary: of the measured model.
        more: other settings.
    """

    name: str
    kind: str
    sizes: tuple[int, int, int, int, int]
    layers: int = _LAYERS
    vocabulary: int = _VOCABULARY
    more: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the model with random weights."""
        import transformers

        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        config = transformers.AutoConfig.for_model(
            self.kind, **dict(zip(names, self.sizes, strict=True)), num_hidden_layers=self.layers,
            vocab_size=self.vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=None, **self.more,
        )  # fmt: skip
        torch.manual_seed(0)
        auto: Any = transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        model.tie_weights()
        sampled = torch.randn(1 << 20).mul_(0.02).bfloat16()  # sampling them all would take longer than measuring
        for weight in model.parameters():
            values = sampled.repeat(-(-weight.numel() // len(sampled)))[: weight.numel()]
            weight.data = values.view_as(weight) if weight.dim() > 1 else torch.ones_like(weight)
        model.save_pretrained(folder)


MODELS = (
    Model("SmolLM2 135M", "llama", (576, 1536, 9, 3, 64), layers=30, more={"tie_word_embeddings": True}),
    Model("Gemma 2B", "gemma", (2048, 16_384, 8, 1, 256)),
    Model("Gemma 2 2B", "gemma2", (2304, 9216, 8, 4, 256)),
    Model("Gemma 3 270M, whole", "gemma3_text", (640, 2048, 4, 1, 256), 18, 262_144, {"sliding_window": 512}),
    Model("Phi 3 mini", "phi3", (3072, 8192, 32, 32, 96), more={"sliding_window": 2047}),
    Model("SmolLM 3 3B", "smollm3", (2048, 11_008, 16, 4, 128)),
    Model(
        "Granite 3.3 2B", "granite", (2048, 8192, 32, 8, 64),
        more={
            "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    Model("OLMo 2 1B", "olmo2", (2048, 8192, 16, 16, 128)),
    Model("OLMo 3 7B", "olmo3", (4096, 11_008, 32, 32, 128)),
    Model("EXAONE 4 1.2B", "exaone4", (2048, 4096, 32, 8, 64), more={"sliding_window": 4096}),
    Model(
        "Qwen 3 30B-A3B, 64 experts", "qwen3_moe", (2048, 6144, 32, 4, 128),
        more={
            "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        },
    ),
    Model(
        "Mixtral 8x7B, half as wide", "mixtral", (2048, 7168, 16, 4, 128),
        more={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
)  # fmt: skip


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[model.kind for model in MODELS], metavar="FAMILY")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the models there")
    arguments = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded, so start again with it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    rounds = 1 if arguments.quick else arguments.rounds
    result = Result("families", "Model families", versions("torch", "transformers"), quick=arguments.quick)
    rows: list[list[object]] = []
    for model in MODELS:
        if arguments.only and model.kind not in arguments.only:
            continue
        before, after = _measure(model, rounds, arguments.models)
        rows.append([model.name, model.layers, before, after, after / before])
        print(*rows[-1], flush=True)
        if model.kind != "llama":  # it had its own step from the start
            result.at_least(f"{model.name}, tokens/s relative to transformers", after / before, _TARGET)
    columns = ["model", "layers", "transformers tokens/s", "kolotune tokens/s", "x"]
    result.tables.append(Table(f"bf16, {torch.get_num_threads()} threads, {_BATCH} chats a step", columns, rows))
    result.notes.append(
        f"Random weights. A vocabulary of {_VOCABULARY:,} tokens, but all of Gemma 3 270M's. Chats of {_SHORTEST} to "
        f"{_LONGEST} random tokens behind a prompt of {_SYSTEM} that all share; the loss covers the second half of "
        "each. Adapters of rank 16 on all linear layers and experts. Without the optimizer."
    )
    result.finish(arguments.json)
    return 0


def _measure(model: Model, rounds: int, kept: Path | None) -> tuple[float, float]:
    """Return tokens/s of transformers and of kolotune, medians over rounds."""
    with tempfile.TemporaryDirectory() as name:
        base = (kept or Path(name)) / model.kind
        if not (base / "config.json").is_file():
            model.write(base)
        job = _job(base)
        contenders: tuple[TrainingModel, ...] = (TransformersModel(job, "cpu"), PackedModel(job))
        steps = [_chats(number) for number in range(rounds + 1)]
        times: list[list[float]] = [[], []]
        for tokens in steps:
            for contender, seconds in zip(contenders, times, strict=True):
                started = time.perf_counter()
                for group in contender.groups(tokens, range(_BATCH)):
                    contender.backward(tokens, group, 1.0)
                seconds.append(time.perf_counter() - started)
        counts = [len(tokens.ids) for tokens in steps]
        before, after = (
            median(count / second for count, second in zip(counts[1:], seconds[1:], strict=True)) for seconds in times
        )
        return before, after


def _chats(seed: int) -> PreparedTokens:
    dice = random.Random(seed)
    system = [dice.randrange(_VOCABULARY) for _ in range(_SYSTEM)]
    lengths = [dice.randint(_SHORTEST, _LONGEST) for _ in range(_BATCH)]
    ids = [token for length in lengths for token in (*system, *(dice.randrange(_VOCABULARY) for _ in range(length)))]
    labelled = [flag for length in lengths for flag in _second_half(length)]
    offsets = torch.tensor([0, *lengths]).cumsum(0) + _SYSTEM * torch.arange(_BATCH + 1)
    return PreparedTokens(torch.tensor(ids, dtype=torch.int32), torch.tensor(labelled, dtype=torch.bool), offsets)


def _second_half(length: int) -> Sequence[int]:
    return [0] * (_SYSTEM + length // 2) + [1] * (length - length // 2)


def _job(base: Path) -> TrainJob:
    return TrainJob(
        resume=False, nproc=1, nnodes=1, rdzv=None, sharded=False, dtype="bf16",
        compile=not build.reason_unavailable(), load_in_4bit=False, epochs=1, learning_rate=1e-4,
        scheduler_type="constant", warmup_steps=0, weight_decay=0.0, batch_size=_BATCH, gradient_accumulation=1,
        max_grad_norm=1.0, seed=0, lora_rank=16, lora_alpha=32.0, lora_dropout=0.0, target_modules=["all-linear"],
        early_stopping=0, checkpoint_steps=0, base_model=str(base), base_name="random", base_sha256="",
        data="", data_sha256="", adapter="", checkpoints="", metrics="", target_parameters=["all-experts"],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
