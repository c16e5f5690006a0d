"""Training speed of each model family: kolotune's own step, and what there was before.

That is transformers with autograd; for experts also transformers with PEFT, which users have without kolotune. Each
contender has the dtype in which PyTorch's products are fastest here, and transformers the implementation of experts
with which its first step is.

    python bench/families.py [--rounds N] [--only FAMILY ...] [--models FOLDER] [--quick] [--json FILE]

Weights are random, in the shapes of published models, with fewer layers, tokens and experts, or narrower, where the
whole would take long. With --models they are written into that folder, and read from there the next time. All steps
compute the same losses and gradients, in turns, in one process, of random chats behind a system prompt.
"""

from __future__ import annotations

import gc
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from family_contenders import EXPERTS, KOLOTUNE, MODULE, Contender, Setting, product_rates, settings_of
from measuring import Result, Table, median, options, versions

from kolotune.engines.job import TrainJob
from kolotune.engines.native.kernels import build
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.engines.process_environment import ENVIRONMENT

_VOCABULARY, _LAYERS = 32_768, 2
_BATCH, _SYSTEM, _SHORTEST, _LONGEST = 4, 20, 30, 150
_TARGET = 2.0
_SAME = 0.02  # of a loss; bf16 rounds


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

    @property
    def expert_weights(self) -> int:
        """Weights of one expert; 0 without experts."""
        hidden, inner, *_ = self.sizes
        return 3 * hidden * self.more.get("moe_intermediate_size", inner) if self.chosen else 0

    @property
    def chosen(self) -> int:
        """How many experts compute a token."""
        return int(self.more.get("num_experts_per_tok", 0))

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
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=EXPERTS, help="transformers' ways to try")
    arguments = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded, so start again with it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    rounds = 1 if arguments.quick else arguments.rounds
    result = Result("families", "Model families", versions("torch", "transformers", "peft"), quick=arguments.quick)
    rows: list[list[object]] = []
    tried: list[list[object]] = []
    rates = product_rates()
    dtype = min(rates, key=lambda dtype: sum(1 / rate for rate in rates[dtype]))
    for model in MODELS:
        if arguments.only and model.kind not in arguments.only:
            continue
        speeds = _measure(model, dtype, arguments.experts, rounds, arguments.models, tried)
        own = next(setting for setting in speeds if setting.contender == KOLOTUNE)
        after = speeds.pop(own)
        for setting, before in speeds.items():
            rows.append(
                [model.name, model.layers, setting.contender, str(setting), before, str(own), after, after / before]
            )
            print(*rows[-1], flush=True)
            if model.kind != "llama" and setting.contender != MODULE:  # Llama had its own step from the start
                result.at_least(f"{model.name}, tokens/s relative to {setting.contender}", after / before, _TARGET)
    columns = ["model", "layers", "before", "its setting", "tokens/s", "kolotune's setting", "kolotune tokens/s", "x"]
    result.tables.append(Table(f"{torch.get_num_threads()} threads, {_BATCH} chats a step", columns, rows))
    products = [[name, *rates_of] for name, rates_of in rates.items()]
    columns = ["dtype", "forward", "of the input", "of the weight"]
    result.tables.append(Table("GFLOP/s of PyTorch's products and their gradients, 100 tokens", columns, products))
    columns = ["model", "contender", "setting", "tokens/s"]
    result.tables.append(Table("First steps, of one chat", columns, tried))
    result.notes.append(
        f"Random weights. A vocabulary of {_VOCABULARY:,} tokens, but all of Gemma 3 270M's. Chats of {_SHORTEST} to "
        f"{_LONGEST} random tokens behind a prompt of {_SYSTEM} that all share; the loss covers the second half of "
        "each. Adapters of rank 16 on all linear layers and experts. Without the optimizer. Tokens are those of the "
        "chats, padding not counted, the shared prompt once a chat."
    )
    result.finish(arguments.json)
    return 0


def _measure(
    model: Model,
    dtype: str,
    experts: Sequence[str],
    rounds: int,
    kept: Path | None,
    tried: list[list[object]],
) -> dict[Setting, float]:
    """Return the tokens/s of each contender in its best setting, medians over rounds; add to the first steps."""
    with tempfile.TemporaryDirectory() as name:
        base = (kept or Path(name)) / model.kind
        if not (base / "config.json").is_file():
            model.write(base)
        job = _job(base)
        steps = [_chats(number) for number in range(rounds + 1)]
        by_contender = settings_of(dtype, experts, has_experts=bool(model.expert_weights))
        best = [_best(model, job, settings, len(steps[0].ids), tried) for settings in by_contender.values()]
        contenders = [(setting, setting.open(job)) for setting in best]
        speeds: dict[Setting, list[float]] = {setting: [] for setting in best}
        for tokens in steps:
            losses = []
            for setting, contender in contenders:
                speed, loss = _step(contender, tokens)
                speeds[setting].append(speed)
                losses.append(loss)
            if not all(math.isclose(loss, losses[-1], rel_tol=_SAME) for loss in losses):
                raise RuntimeError(f"{model.name}: the contenders' losses differ: {losses}")
        return {setting: median(each[1:]) for setting, each in speeds.items()}


def _best(
    model: Model, job: TrainJob, settings: Sequence[Setting], step_tokens: int, tried: list[list[object]]
) -> Setting:
    """Return the setting in which a contender's first step, of one chat, is fastest."""
    if len(settings) == 1:
        return settings[0]
    speeds: dict[Setting, float] = {}
    for setting in settings:
        row = [model.name, setting.contender, str(setting)]
        gathered = setting.gathered_bytes(model.expert_weights, step_tokens * model.chosen)
        if gathered > psutil.virtual_memory().available:
            tried.append([*row, f"a step needs {gathered / 1e9:.0f} GB"])
            continue
        contender = setting.open(job)
        speeds[setting], _ = _step(contender, _chats(0, 1))
        del contender
        gc.collect()
        tried.append([*row, speeds[setting]])
        print(*tried[-1], flush=True)
    return max(speeds, key=speeds.__getitem__)


def _step(contender: Contender, tokens: PreparedTokens) -> tuple[float, float]:
    """Return the tokens/s of a step, and its loss."""
    started = time.perf_counter()
    loss = sum(float(contender.backward(tokens, group, 1.0)) for group in contender.groups(tokens, range(len(tokens))))
    return len(tokens.ids) / (time.perf_counter() - started), loss


def _chats(seed: int, count: int = _BATCH) -> PreparedTokens:
    dice = random.Random(seed)
    system = [dice.randrange(_VOCABULARY) for _ in range(_SYSTEM)]
    lengths = [dice.randint(_SHORTEST, _LONGEST) for _ in range(count)]
    ids = [token for length in lengths for token in (*system, *(dice.randrange(_VOCABULARY) for _ in range(length)))]
    labelled = [flag for length in lengths for flag in _second_half(length)]
    offsets = torch.tensor([0, *lengths]).cumsum(0) + _SYSTEM * torch.arange(count + 1)
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
