"""From adapter to GGUF, in turns with the steps of the original pipeline, on random models shaped like Llama 3.2.

    python bench/merge_convert.py [--sizes 1b,3b] [--rounds N] [--folder DIR] [--json FILE] [--quick]

The original's steps: transformers loads and saves, llama.cpp's converter runs as a child, then llama.cpp's quantizer.
kolotune's: the stages merge, convert and quantize as `kolotune run` runs them, with hashes and records, and everything
flushed to disk; the quantizer alone; and the same with --lean. One run is cold: it has to make the conversion plan.
Models and results are in a temporary folder inside --folder, which needs about six times the size of a model.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import environments
import measuring
from measuring import Measured, Result, Table, measure, medians

from kolotune import llamacpp
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE
from kolotune.foundation.reporter import PlainReporter

if TYPE_CHECKING:
    import numpy as np

sys.path.append(str(measuring.ROOT / "tests"))
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
TWO_FORMS = 1.28  # of a tensor, as f16 and as Q4_K, relative to the first
RANK, QUANTIZATION = 16, "Q4_K_M"
TIMED = "1b"
TARGET_SECONDS, TARGET_SHARE, BASE_MEMORY_MB = 10.0, 1 / 3, 350.0
_ORIGINAL_MERGE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""
_ORIGINAL_QUANTIZER = environments.PEERS / "quantize.py"
_STAGES = """
import json, sys
from pathlib import Path
from kolotune.foundation import config
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
options, names, adapter = json.loads(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
run_pipeline(config.resolve((options, "bench", Path.cwd())), PlainReporter(), names, adapter)
"""


def make_model(folder: Path, size: str) -> float:
    """Make a random model and an adapter, a tensor at a time; return the MB of the largest tensor."""
    import torch
    from safetensors.torch import save_file
    from support import llama3
    from transformers import AutoModelForCausalLM

    from kolotune.weights.safetensors_header import Entry
    from kolotune.weights.shards import split_into_shards, write_shards

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    shape = llama3.shape(**SHAPES[size])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.named_parameters())}
    generator = torch.Generator().manual_seed(3)

    def values(entry: Entry) -> Iterator[np.ndarray]:
        norm = "norm" in entry.name
        for row in range(0, entry.shape[0], 4096):
            part = torch.empty((min(4096, entry.shape[0] - row), *entry.shape[1:]), dtype=torch.bfloat16)
            part = part.fill_(1) if norm else part.normal_(0, 0.02, generator=generator)
            yield part.view(torch.int16).numpy()

    entries = [Entry(name, "BF16", size) for name, size in shapes.items()]
    write_shards(base, split_into_shards(entries), values)
    adapter_weights = {}
    for name, (outputs, *inputs) in shapes.items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter_weights[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs[0], generator=generator) * 0.02
            adapter_weights[f"{module}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.02
    save_file(adapter_weights, adapter / "adapter_model.safetensors")
    peft_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(peft_config), encoding="utf-8")
    shape.architectures, shape.dtype = ["LlamaForCausalLM"], torch.bfloat16
    shape.save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["made_for"] = f"a measurement at {time.time()}"  # so that it has no conversion plan yet
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    llama3.tokenizer().save_pretrained(base)
    shutil.copyfile(llamacpp.templates_folder() / llama3.TEMPLATE, base / TEMPLATE_FILE)
    return max(entry.size for entry in entries) / 1e6


def run_stages(folder: Path, names: str, log: Path, **options: object) -> tuple[Measured, dict[str, float]]:
    """Run stages of kolotune; return the measurement, and the seconds that each stage reported."""
    values: dict[str, object] = {"base_model": str(folder / "base"), "output_dir": str(folder / "run"), "dtype": "bf16"}
    values |= {"quantization": [QUANTIZATION], **options}
    log_start = log.stat().st_size if log.exists() else 0
    measured = measure([sys.executable, "-P", "-c", _STAGES, json.dumps(values), names, folder / "adapter"], log)
    text = log.read_bytes()[log_start:].decode("utf-8", errors="replace")
    return measured, {name: float(seconds) for name, seconds in re.findall(r"ok  (\w+): .* in ([\d.]+) s", text)}


def one_round(folder: Path, quantize: bool) -> dict[str, Measured]:
    """Run each step once, the original's and kolotune's in turns."""
    from kolotune.foundation.quantization_types import FILE_TYPES

    toolchain, log = llamacpp.ensure(PlainReporter()), folder / "log"
    python = [sys.executable, "-P", "-c"]
    base, merged, gguf, small = (
        folder / name for name in ("base", "original_merged", "original.gguf", "original_quantized.gguf")
    )
    run = folder / "run"
    steps = {}
    steps["merge"] = measure([*python, _ORIGINAL_MERGE, base, merged], log)
    steps["convert"] = measure(
        [sys.executable, toolchain.converter, "--outtype", "f16", "--outfile", gguf, merged], log
    )
    shutil.rmtree(merged)
    shutil.rmtree(run, ignore_errors=True)
    steps["kolotune: merge, convert"], _ = run_stages(folder, "merge,convert", log)
    if quantize:
        job = json.dumps({"source": str(gguf), "target": str(small), "type": FILE_TYPES[QUANTIZATION]})
        steps["quantize"] = measure([environments.ensure("llama_cpp") / "python", _ORIGINAL_QUANTIZER, job], log)
        small.unlink()
        argv = [sys.executable, "-P", "-m", "kolotune.gguf.quantizer", gguf, small, QUANTIZATION]
        steps["kolotune: quantizer"] = measure(argv, log)
        total, seconds = run_stages(folder, "merge,convert,quantize", log)
        steps["kolotune: quantize"] = Measured(seconds["quantize"], total.peak_mb, total.anonymous_mb, 0)
        small.unlink()
    gguf.unlink()
    shutil.rmtree(run)
    steps["kolotune, lean: f16 only"], _ = run_stages(folder, "merge,convert", log, lean=True, quantization=["none"])
    shutil.rmtree(run)
    return steps


def measure_size(size: str, folder: Path, rounds: int, quantize: bool, result: Result) -> None:
    """Measure all rounds of one size."""
    largest = make_model(folder, size)
    cold, _ = run_stages(folder, "merge,convert", folder / "log", lean=True, quantization=["none"])
    shutil.rmtree(folder / "run")
    runs: dict[str, list[Measured]] = {}
    for number in range(rounds):
        for name, measured in one_round(folder, quantize).items():
            runs.setdefault(name, []).append(measured)
        seconds = ", ".join(f"{name} {step_runs[-1].seconds:.1f}" for name, step_runs in runs.items())
        print(f"{size}, round {number + 1}, seconds: {seconds}", flush=True)
    steps = {name: medians(step_runs) for name, step_runs in runs.items()}
    original = steps["merge"].seconds + steps["convert"].seconds
    rows: list[list[object]] = [[name, step.seconds, step.anonymous_mb] for name, step in steps.items()]
    rows.append(["kolotune, lean, cold: makes the conversion plan", cold.seconds, cold.anonymous_mb])
    result.tables.append(Table(f"{size}, medians of {rounds}", ["step", "seconds", "peak anonymous MB"], rows))
    memory_limit = BASE_MEMORY_MB + 2 * largest
    for name in ("kolotune: merge, convert", "kolotune, lean: f16 only"):
        measured = steps[name]
        speedup = original / measured.seconds
        if size == TIMED:  # larger models take longer than that on any disk
            times = f"{measured.seconds:.1f} s, the original {original:.1f} s: {speedup:.1f} x"
            passed = measured.seconds <= TARGET_SECONDS or speedup >= 1 / TARGET_SHARE
            target = f"{TARGET_SECONDS:.0f} s, or a third of the original's time"
            result.figures.append(measuring.Figure(f"{size}: {name}", target, times, passed))
        result.at_most(f"{size}: {name}, anonymous memory", measured.anonymous_mb, memory_limit, " MB")
    if quantize:
        ratio = steps["kolotune: quantizer"].seconds / steps["quantize"].seconds
        what = f"{size}: time of the quantizer relative to llama.cpp's own, within noise"
        result.at_most(what, ratio, measuring.NOISE, " x")
        memory = steps["kolotune: quantizer"].anonymous_mb
        result.at_most(f"{size}: quantizer, anonymous memory", memory, TWO_FORMS * largest, " MB")


def main() -> int:
    """Measure and report."""
    parser = measuring.options(__doc__)
    parser.add_argument("--sizes", default="1b,3b", help="1b, 3b or both, as 1b,3b; quantizing is measured at 1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-quantize", action="store_true", help="skip the quantizer, which takes longest")
    parser.add_argument("--folder", type=Path, help="where to make the temporary models")
    arguments = parser.parse_args()
    result = Result("merge_convert", "From adapter to GGUF", quick=arguments.quick)
    result.versions = measuring.versions("torch", "transformers", "xllamacpp", "numpy")
    rounds = 1 if arguments.quick else arguments.rounds
    for size in ("tiny",) if arguments.quick else arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            quantize = size != "3b" and not arguments.no_quantize
            measure_size(size, Path(folder), rounds, quantize, result)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
