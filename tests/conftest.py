"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.control_groups import memory_group  # noqa: F401 - a fixture
from support.docker_engine import container, docker_engine, image, small_base  # noqa: F401 - fixtures
from support.go_templates import go  # noqa: F401 - a fixture
from support.mounts import mount  # noqa: F401 - a fixture
from support.ollama_stand_in import any_ollama, ollama_stand_in  # noqa: F401 - fixtures
from support.training import VOCABULARY, TrainingFolder, random_chats, write_tokens

from kolotune import llamacpp
from kolotune.foundation.reporter import PlainReporter

SAMPLE = Path(__file__).parent.parent / "examples" / "lighthouse"
# How long an example takes says something about the machine, which is shared, and nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


# Workers side by side share the cores: threads that wait for each other on a busy core make no progress. Before torch.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# A shell that starts the tests in the background has Ctrl-C ignored, and so would all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report which tests an ordinary run leaves out."""
    if "not container" in config.option.markexpr:
        terminalreporter.write_line("left out: the tests that need a Docker engine; `make test-container` runs them")


@pytest.fixture(autouse=True, scope="module")
def nothing_left_over() -> Iterator[None]:
    """Free unused llama.cpp models after each module: llama.cpp logs to standard error when one is freed."""
    yield
    gc.collect()
    gc.freeze()  # the next module's collection does not look at what stays, which takes a fifth of a second and more


@pytest.fixture(scope="session")
def reporter() -> PlainReporter:
    """Return a reporter that prints plain lines."""
    return PlainReporter()


@pytest.fixture(scope="session")
def toolchain(reporter: PlainReporter) -> llamacpp.Toolchain:
    """Return llama.cpp's converter, downloaded the first time."""
    return llamacpp.ensure(reporter)


@pytest.fixture(scope="session")
def sample_chats() -> Path:
    """Return the chats of the example."""
    return SAMPLE / "chats.jsonl"


def _configs() -> dict[str, Callable[..., Any]]:
    import transformers

    return {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
        "mixtral": transformers.MixtralConfig,
        "qwen2_moe": transformers.Qwen2MoeConfig,
        "phi3": transformers.Phi3Config,
        "gpt2": transformers.GPT2Config,
    }


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Return a function that makes a random model of 2 layers.

    It is called as ``tiny_model(kind, folder, seed=…, dtype=…, shard=…, **config)``; kind: a model type of
    transformers.
    """

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
        if kind.startswith("gemma"):
            shape |= {"head_dim": 16, "tie_word_embeddings": True}
        if kind == "qwen3":
            shape |= {"head_dim": 32}
        if kind == "mistral":
            shape |= {"sliding_window": None}
        torch.manual_seed(seed)
        make_config = _configs().get(kind) or partial(transformers.AutoConfig.for_model, kind)
        model = transformers.AutoModelForCausalLM.from_config(make_config(**{**shape, **more}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # otherwise all ones and zeros: nothing to get wrong
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.to(getattr(torch, dtype)).eval()
        if folder is not None:
            model.save_pretrained(folder, max_shard_size=shard)
        return model

    return make


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread: several are slower on tiny matrices, and very slow where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_training(tmp_path: Path, tiny_model: Callable[..., Any], one_thread: None) -> Callable[..., TrainingFolder]:
    """Return a function that makes a `TrainingFolder`: ``make_training(kind, chats=10, held_out=3, **config)``."""

    def make(kind: str = "llama", *, chats: Any = 10, held_out: Any = 0, **config: Any) -> TrainingFolder:
        tiny_model(kind, tmp_path / "base", **config)
        train = random_chats(chats, 1) if isinstance(chats, int) else chats
        write_tokens(tmp_path / "data" / "train.safetensors", train)
        if held_out:
            kept = random_chats(held_out, 2) if isinstance(held_out, int) else held_out
            write_tokens(tmp_path / "data" / "held_out.safetensors", kept)
        return TrainingFolder(tmp_path)

    return make


@pytest.fixture(scope="session")
def templates_folder(toolchain: llamacpp.Toolchain) -> Path:
    """Return the folder of llama.cpp's collection of real chat templates."""
    return llamacpp.templates_folder()
