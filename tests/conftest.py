"""What several test rooms need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.docker_engine import container, docker_engine, image, small_base  # noqa: F401 - fixtures

from kolotune import llamacpp
from kolotune.engines.job import TrainJob
from kolotune.reporter import PlainReporter

SAMPLE = Path(__file__).parent.parent / "examples" / "lighthouse"
VOCABULARY = 96


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says what an ordinary run does not do."""
    if "not container" in config.option.markexpr:
        terminalreporter.write_line("left out: the tests that need a Docker engine; `make test-container` runs them")


@pytest.fixture(scope="session")
def reporter() -> PlainReporter:
    """A reporter that prints plain lines."""
    return PlainReporter()


@pytest.fixture(scope="session")
def toolchain(reporter: PlainReporter) -> llamacpp.Toolchain:
    """llama.cpp's converter, fetched the first time."""
    return llamacpp.ensure(reporter)


@pytest.fixture(scope="session")
def sample_chats() -> Path:
    """The chats of the sample."""
    return SAMPLE / "chats.jsonl"


def _configs() -> dict[str, Callable[..., Any]]:
    import transformers

    return {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "gemma": transformers.GemmaConfig,
        "gpt2": transformers.GPT2Config,
    }


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes a random model of 2 layers: ``tiny_model(kind, folder, seed=…, dtype=…, shard=…, **config)``."""

    def make(
        kind: str, folder: Path | None = None, *, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **more: Any
    ) -> Any:
        import torch
        import transformers

        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        if kind == "gpt2":
            shape = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        if kind == "gemma":
            shape |= {"head_dim": 16, "tie_word_embeddings": True}
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_configs()[kind](**{**shape, **more}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # otherwise all ones and zeros: nothing to get wrong
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.to(getattr(torch, dtype)).eval()
        if folder is not None:
            model.save_pretrained(folder, max_shard_size=shard)
        return model

    return make


def write_tokens(path: Path, chats: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Chats (ids, flags) as the prepare stage writes them."""
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "ids": np.array([each for ids, _ in chats for each in ids], np.int32),
            "labelled": np.array([each for _, flags in chats for each in flags], np.uint8),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in chats)], dtype=np.int64),
        },
        path,
    )


def random_chats(count: int, seed: int, shortest: int = 5, longest: int = 20) -> list[tuple[list[int], list[int]]]:
    """Chats of random tokens that follow a rule (each answer token is its predecessor plus 3), partly labelled."""
    import random

    dice = random.Random(seed)
    chats = []
    for _ in range(count):
        length = dice.randint(shortest, longest)
        start = dice.randint(1, length - 2)
        ids = [dice.randrange(VOCABULARY) for _ in range(start)]
        while len(ids) < length:
            ids.append((ids[-1] + 3) % VOCABULARY)
        chats.append((ids, [int(at >= start and dice.random() < 0.9) for at in range(length)]))
        chats[-1][1][-1] = 1
    return chats


@dataclass(frozen=True)
class TrainingRoom:
    """A folder with a base model and data, and the jobs that train there."""

    root: Path

    def job(self, name: str = "run", **options: Any) -> TrainJob:
        """A job whose outputs stand in the folder `name`; the options are those of `TrainJob`."""
        chosen: dict[str, Any] = {
            "resume": False,
            "dtype": "fp32",
            "load_in_4bit": False,
            "epochs": 2,
            "learning_rate": 5e-3,
            "scheduler_type": "cosine",
            "warmup_steps": None,
            "weight_decay": 0.01,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_grad_norm": 1.0,
            "seed": 7,
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "target_modules": ["all-linear"],
            "early_stopping": 0,
            "checkpoint_steps": 0,
            "base_model": str(self.root / "base"),
            "base_name": "tiny",
            "base_sha256": "b",
            "data": str(self.root / "data"),
            "data_sha256": "d",
            "adapter": str(self.root / name / "adapter"),
            "checkpoints": str(self.root / name / "checkpoints"),
            "metrics": str(self.root / name / "metrics.jsonl"),
        }
        (self.root / name).mkdir(exist_ok=True)
        return TrainJob(**{**chosen, **options})


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny matrices are slower with several threads, and very slow where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def training_room(tmp_path: Path, tiny_model: Callable[..., Any], one_thread: None) -> Callable[..., TrainingRoom]:
    """Makes a `TrainingRoom`: ``training_room(kind, chats=10, held_out=3, **config)``."""

    def make(kind: str = "llama", *, chats: Any = 10, held_out: Any = 0, **config: Any) -> TrainingRoom:
        tiny_model(kind, tmp_path / "base", **config)
        train = random_chats(chats, 1) if isinstance(chats, int) else chats
        write_tokens(tmp_path / "data" / "train.safetensors", train)
        if held_out:
            kept = random_chats(held_out, 2) if isinstance(held_out, int) else held_out
            write_tokens(tmp_path / "data" / "held_out.safetensors", kept)
        return TrainingRoom(tmp_path)

    return make


@pytest.fixture(scope="session")
def templates_folder(toolchain: llamacpp.Toolchain) -> Path:
    """llama.cpp's collection of real chat templates."""
    return llamacpp.templates_folder()
