"""The whole job, from chats to a quantized GGUF: kolotune, the original pipeline, and train and merge of soup-cli.

    python bench/whole_job.py [--rounds N] [--quick] [--json FILE]

The original pipeline is torchtune 0.6.1 with its own `tune` command and recipe, with activation checkpointing; then
transformers loads and saves, and llama.cpp converts and quantizes. soup-cli stops after merging, because it then needs
a llama.cpp that the user has built. All train on the same chats for one epoch in bf16, with the same settings, and take
turns. Warm means that the base model, the dry conversion and compiled kernels are in the cache. PEFT computes the loss
of every adapter in fp32 on the same held-out chats.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import environments
import material
import yaml
from measuring import KOLOTUNE, ROOT, Measured, Result, Table, measure, median, options, versions

from kolotune.foundation.errors import FidelityError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.foundation.reporter import PlainReporter
from kolotune.llamacpp import toolchain
from kolotune.run_folder.layout import RunFolder

sys.path.append(str(ROOT / "tests"))
from support.reference_training import held_out_loss

PYTHON = Path(sys.executable)


@dataclass
class Job:
    """The job of one program: its steps by name, and its adapter."""

    steps: dict[str, Measured] = field(default_factory=dict)
    adapter: Path = Path()

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps.values())

    @property
    def peak_mb(self) -> float:
        return max(step.peak_mb for step in self.steps.values())


def kolotune(
    chats: material.Chats,
    folder: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    accepted: tuple[int, ...] = (0,),
) -> Job:
    """Measure `kolotune run`; `accepted` lists the exit codes that are not failures."""
    run = folder / "run"
    argv = [*KOLOTUNE, "run", chats.train, *material.settings(), "--output-dir", run, *(flags or ("--no-compare",))]
    measured = measure(argv, folder / "log", env=material.OFFLINE | (env or {}), accepted=accepted)
    return Job({"run": measured}, RunFolder(run).adapter)


def original(chats: material.Chats, folder: Path) -> Job:
    """Measure the steps of the original scripts, each in a process."""
    folder.mkdir(parents=True)
    log, merged, gguf = folder / "log", folder / "merged", folder / "model.gguf"
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(torchtune_config(chats, folder)), encoding="utf-8")
    programs = environments.ensure_torchtune()
    env = material.OFFLINE | {"PYTHONPATH": str(environments.PEERS), "HF_HOME": str(folder / "hub")}
    tune = [programs / "tune", "run", "lora_finetune_single_device", "--config", config]
    job = Job(adapter=folder / "trained" / "epoch_0")
    job.steps["train"] = measure(tune, log, env=env)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (job.adapter / name).write_bytes((material.base() / name).read_bytes())
    (folder / "peft.json").write_bytes((job.adapter / "adapter_config.json").read_bytes())
    merge = [PYTHON, environments.PEERS / "merge_lora.py", job.adapter, merged]
    job.steps["merge"] = measure(merge, log, env=material.OFFLINE)
    converter = toolchain.ensure(PlainReporter()).converter
    convert = [PYTHON, converter, merged, "--outtype", "f16", "--outfile", gguf]
    job.steps["convert"] = measure(convert, log, env=material.OFFLINE)
    target = folder / "model-Q4_K_M.gguf"
    quantizing = json.dumps({"source": str(gguf), "target": str(target), "type": FILE_TYPES["Q4_K_M"]})
    quantize = [environments.ensure("llama_cpp") / "python", environments.PEERS / "quantize.py", quantizing]
    job.steps["quantize"] = measure(quantize, log)
    job.adapter = as_peft(job.adapter, folder)
    return job


def as_peft(trained: Path, folder: Path) -> Path:
    """Copy torchtune's adapter into a PEFT folder, to compute its loss."""
    adapter = folder / "adapter"
    adapter.mkdir()
    config = json.loads((folder / "peft.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(material.base())
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes((trained / "adapter_model.safetensors").read_bytes())
    return adapter


def torchtune_config(chats: material.Chats, folder: Path) -> dict[str, object]:
    """Return the config of torchtune's recipe as in the original scripts, with SmolLM2's shape."""
    base = json.loads((material.base() / "config.json").read_text(encoding="utf-8"))
    steps = -(-chats.count // material.BATCH_SIZE)
    return {
        "output_dir": str(folder / "trained"),
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
            "apply_lora_to_output": False, "lora_rank": material.RANK, "lora_alpha": material.ALPHA,
            "lora_dropout": 0.0, "vocab_size": base["vocab_size"], "num_layers": base["num_hidden_layers"],
            "num_heads": base["num_attention_heads"], "num_kv_heads": base["num_key_value_heads"],
            "embed_dim": base["hidden_size"], "intermediate_dim": base["intermediate_size"],
            "max_seq_len": base["max_position_embeddings"], "norm_eps": base["rms_norm_eps"],
            "rope_base": int(base["rope_parameters"]["rope_theta"]), "scale_factor": 1,
        },
        "tokenizer": {
            "_component_": "chat_tokens.ChatTokens", "path": str(material.base()),
            "max_seq_len": material.MAX_SEQUENCE,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(material.base()),
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
            "output_dir": str(folder / "trained"), "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False, "save_adapter_weights_only": False,
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset", "packed": False, "source": "json",
            "data_files": str(chats.train), "conversation_column": "messages", "conversation_style": "openai",
            "split": "train",
        },
        "seed": material.SEED, "shuffle": True, "batch_size": material.BATCH_SIZE,
        "optimizer": {
            "_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": material.LEARNING_RATE,
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": int(steps * material.WARMUP_SHARE),
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1, "max_steps_per_epoch": None, "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0,
        "compile": False, "device": "cpu", "dtype": "bf16", "enable_activation_checkpointing": True,
        "enable_activation_offloading": False, "log_every_n_steps": 1, "log_peak_memory_stats": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder / "logs"),
        },
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
    }  # fmt: skip


def soup(chats: material.Chats, folder: Path) -> Job:
    """Measure train and merge of soup-cli."""
    folder.mkdir(parents=True)
    log, adapter = folder / "log", folder / "adapter"
    config = {
        "base": str(material.base()), "task": "sft", "output": str(adapter),
        "data": {
            "train": str(chats.train), "format": "chatml", "val_split": 0.0, "max_length": material.MAX_SEQUENCE,
            "train_on_responses_only": True,
        },
        "training": {
            "epochs": 1, "lr": material.LEARNING_RATE, "batch_size": material.BATCH_SIZE,
            "gradient_accumulation_steps": 1, "seed": material.SEED, "warmup_ratio": material.WARMUP_SHARE,
            "scheduler": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0, "quantization": "none",
            "optimizer": "adamw_torch",
            "lora": {
                "r": material.RANK, "alpha": material.ALPHA, "dropout": 0.0, "target_modules": list(material.TARGETS),
            },
        },
    }  # fmt: skip
    (folder / "soup.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    program, env = environments.ensure("soup") / "soup", material.OFFLINE | {"HOME": str(folder)}
    job = Job(adapter=adapter)
    job.steps["train"] = measure([program, "train", "--config", "soup.yaml", "--yes"], log, env=env, cwd=folder)
    merge = [program, "merge", "--adapter", adapter, "--base", material.base(), "--output", folder / "merged"]
    job.steps["merge"] = measure(merge, log, env=env, cwd=folder)
    return job


def evaluate(jobs: dict[str, Job], chats: material.Chats, folder: Path) -> dict[str, float]:
    """Return the loss of each adapter on the held-out chats."""
    run = folder / "evaluation"
    argv = [*KOLOTUNE, "prepare", chats.train, "--eval-data", chats.held_out, "--output-dir", run]
    measure(argv, folder / "log", env=material.OFFLINE)
    prepared = RunFolder(run).prepared
    return {name: held_out_loss(material.base(), job.adapter, prepared) for name, job in jobs.items()}


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    few, many = (16, 32) if arguments.quick else (160, 640)
    rounds = 1 if arguments.quick else arguments.rounds
    result = Result("whole_job", "Whole jobs", versions("torch", "transformers", "peft"), quick=arguments.quick)
    result.versions |= environments.versions(environments.ensure_torchtune(), "torchtune")
    result.versions |= environments.versions(environments.ensure("soup"), "soup-cli", "trl")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        chats = material.chats(root / "few", few)
        kolotune(chats, root / "warm")
        programs: dict[str, Callable[[material.Chats, Path], Job]] = {
            "kolotune": kolotune, "original": original, "soup-cli": soup,
        }  # fmt: skip
        jobs: dict[str, list[Job]] = {program: [] for program in programs}
        for number in range(rounds):
            for program, job in programs.items():
                jobs[program].append(job(chats, root / f"{program}-{number}"))
                print(f"round {number + 1}, {program}: {jobs[program][-1].seconds:.1f} s", flush=True)
        losses = evaluate({program: runs[-1] for program, runs in jobs.items()}, chats, root)
        _add_rounds(result, jobs, losses, few)
        _add_other_modes(result, chats, root)
        large = material.chats(root / "many", many)
        ours, theirs = kolotune(large, root / "ours-many"), original(large, root / "original-many")
        losses = evaluate({"kolotune": ours, "original": theirs}, large, root / "many")
        _add_large(result, ours, theirs, losses, many)
    result.finish(arguments.json)
    return 0


def _add_rounds(result: Result, jobs: dict[str, list[Job]], losses: dict[str, float], count: int) -> None:
    seconds = {program: median(run.seconds for run in runs) for program, runs in jobs.items()}
    peaks = {program: median(run.peak_mb for run in runs) for program, runs in jobs.items()}
    rows = []
    for program, runs in jobs.items():
        for step in runs[0].steps:
            measured = [run.steps[step] for run in runs]
            rows.append([program, step, median(m.seconds for m in measured), median(m.peak_mb for m in measured), ""])
        rows.append([f"**{program}**", "all", seconds[program], peaks[program], f"{losses[program]:.4f}"])
    result.tables.append(
        Table(f"{count} chats, one epoch, medians", ["program", "step", "s", "peak MB", "held-out loss"], rows)
    )
    what = f"whole job, {count} chats"
    result.at_least(f"{what}, speedup over the original pipeline", seconds["original"] / seconds["kolotune"], 6)
    result.at_most(
        f"{what}, peak memory relative to the original pipeline", 100 * peaks["kolotune"] / peaks["original"], 70, "%"
    )
    result.at_least(f"{what}, speedup over train and merge of soup-cli", seconds["soup-cli"] / seconds["kolotune"], 4)
    result.at_most(f"{what}, peak memory relative to soup-cli", 100 * peaks["kolotune"] / peaks["soup-cli"], 25, "%")
    for program, name in (("original", "the original pipeline"), ("soup-cli", "soup-cli")):
        difference = 100 * abs(losses["kolotune"] / losses[program] - 1)
        result.at_most(f"{what}, difference in held-out loss from {name}", difference, 1, "%")


def _add_other_modes(result: Result, chats: material.Chats, root: Path) -> None:
    """Add the job with an empty cache, and the job with a comparison at the end."""
    # It compares on the held-out chats. A model with so little training may fail; only the time matters here.
    flags = ("--compare", "--eval-data", str(chats.held_out))
    compared = kolotune(chats, root / "compared", *flags, accepted=(0, FidelityError.exit_code))
    empty = {"KOLOTUNE_CACHE": str(root / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
    # OFFLINE applies only to the hub's libraries; the base model comes from the package index.
    cold = kolotune(chats, root / "cold", env=empty)
    rows = [
        ["with --compare, warm", compared.seconds, compared.peak_mb],
        ["cold: empty cache", cold.seconds, cold.peak_mb],
    ]
    result.tables.append(Table(f"kolotune, {chats.count} chats, once each", ["mode", "s", "peak MB"], rows))


def _add_large(result: Result, ours: Job, theirs: Job, losses: dict[str, float], count: int) -> None:
    rows = [
        [program, job.seconds, job.peak_mb, f"{losses[program]:.4f}"]
        for program, job in (("kolotune", ours), ("original", theirs))
    ]
    result.tables.append(Table(f"{count} chats, once", ["program", "s", "peak MB", "held-out loss"], rows))
    what = f"whole job, {count} chats, once"
    result.at_least(f"{what}, speedup over the original pipeline", theirs.seconds / ours.seconds, 8)
    result.at_most(
        f"{what}, difference in held-out loss", 100 * abs(losses["kolotune"] / losses["original"] - 1), 1, "%"
    )


if __name__ == "__main__":
    raise SystemExit(main())
