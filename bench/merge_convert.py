"""From adapter to GGUF, against the original's steps, on random models in the shape of Llama 3.2, in turns.

    python bench/merge_convert.py [--sizes 1b,3b] [--rounds N] [--folder DIR] [--json FILE] [--quick]

The original's steps: transformers loads and saves, llama.cpp's converter runs as a child, llama.cpp's quantizer. Ours:
the stages merge, convert and quantize as `kolotune run` runs them, with hashes, records and everything brought to the
disk; and the same with --lean. All of them warm but for one cold run, whose outline has to be drawn. Models and results
lie in a temporary folder of --folder; a size takes some six times its bytes there.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
from measuring import Measured, Result, Table, measure, medians

from kolotune import llamacpp
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE
from kolotune.foundation.reporter import PlainReporter

sys.path.append(str(measuring.ROOT / "tests"))
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
RANK, QUANTIZATION = 16, "Q4_K_M"
TIMED = "1b"
WANTED_SECONDS, WANTED_SHARE, ROOM_MB = 10.0, 1 / 3, 350.0
_ORIGINAL_MERGE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""
_ORIGINAL_QUANTIZE = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""
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
    """A random model and an adapter beside it, a tensor at a time; returns MB of the largest tensor."""
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
    shapes = {name: tuple(each.shape) for name, each in sorted(model.named_parameters())}
    generator = torch.Generator().manual_seed(3)

    def values(entry: Entry) -> Any:
        norm = "norm" in entry.name
        for row in range(0, entry.shape[0], 4096):
            part = torch.empty((min(4096, entry.shape[0] - row), *entry.shape[1:]), dtype=torch.bfloat16)
            part = part.fill_(1) if norm else part.normal_(0, 0.02, generator=generator)
            yield part.view(torch.int16).numpy()

    entries = [Entry(name, "BF16", each) for name, each in shapes.items()]
    write_shards(base, split_into_shards(entries), values)
    halves = {}
    for name, each in shapes.items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            halves[f"{module}.lora_A.weight"] = torch.randn(RANK, each[1], generator=generator) * 0.02
            halves[f"{module}.lora_B.weight"] = torch.randn(each[0], RANK, generator=generator) * 0.02
    save_file(halves, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    shape.architectures, shape.dtype = ["LlamaForCausalLM"], torch.bfloat16
    shape.save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["made_for"] = f"a measurement at {time.time()}"  # so that no outline of it is known yet
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    llama3.tokenizer().save_pretrained(base)
    shutil.copyfile(llamacpp.templates_folder() / llama3.TEMPLATE, base / TEMPLATE_FILE)
    return max(entry.size for entry in entries) / 1e6


def ours(folder: Path, names: str, log: Path, **options: Any) -> tuple[Measured, dict[str, float]]:
    """Runs stages; returns what was measured, and the seconds that each stage told."""
    values = {"base_model": str(folder / "base"), "output_dir": str(folder / "run"), "dtype": "bf16"}
    values |= {"quantization": [QUANTIZATION], **options}
    begun = log.stat().st_size if log.exists() else 0
    found = measure([sys.executable, "-P", "-c", _STAGES, json.dumps(values), names, folder / "adapter"], log)
    text = log.read_bytes()[begun:].decode("utf-8", errors="replace")
    return found, {name: float(seconds) for name, seconds in re.findall(r"ok  (\w+): .* in ([\d.]+) s", text)}


def one_round(folder: Path, quantize: bool) -> dict[str, Measured]:
    """Each step once, the original's and ours in turns."""
    from kolotune.foundation.quantization_types import FILE_TYPES

    toolchain, log = llamacpp.ensure(PlainReporter()), folder / "log"
    python = [sys.executable, "-P", "-c"]
    base, merged, gguf, small = (folder / name for name in ("base", "its_merged", "its.gguf", "its_small.gguf"))
    run = folder / "run"
    found = {}
    found["merge"] = measure([*python, _ORIGINAL_MERGE, base, merged], log)
    found["convert"] = measure(
        [sys.executable, toolchain.converter, "--outtype", "f16", "--outfile", gguf, merged], log
    )
    shutil.rmtree(merged)
    shutil.rmtree(run, ignore_errors=True)
    found["ours: merge, convert"], _ = ours(folder, "merge,convert", log)
    if quantize:
        argv = [*python, _ORIGINAL_QUANTIZE, gguf, small, str(FILE_TYPES[QUANTIZATION])]
        found["quantize"] = measure(argv, log)
        whole, told = ours(folder, "merge,convert,quantize", log)
        found["ours: quantize"] = Measured(told["quantize"], whole.peak_mb, whole.anonymous_mb, 0)
        small.unlink()
    gguf.unlink()
    shutil.rmtree(run)
    found["ours, lean: f16 only"], _ = ours(folder, "merge,convert", log, lean=True, quantization=["none"])
    shutil.rmtree(run)
    return found


def measure_size(size: str, folder: Path, rounds: int, quantize: bool, result: Result) -> None:
    """All rounds of one size, into the result."""
    largest = make_model(folder, size)
    cold, _ = ours(folder, "merge,convert", folder / "log", lean=True, quantization=["none"])
    shutil.rmtree(folder / "run")
    runs: dict[str, list[Measured]] = {}
    for number in range(rounds):
        for name, each in one_round(folder, quantize).items():
            runs.setdefault(name, []).append(each)
        told = ", ".join(f"{name} {each[-1].seconds:.1f}" for name, each in runs.items())
        print(f"{size}, round {number + 1}, seconds: {told}", flush=True)
    found = {name: medians(each) for name, each in runs.items()}
    its = found["merge"].seconds + found["convert"].seconds
    rows: list[list[Any]] = [[name, each.seconds, each.anonymous_mb] for name, each in found.items()]
    rows.append(["ours, lean, cold: its outline is drawn", cold.seconds, cold.anonymous_mb])
    result.tables.append(Table(f"{size}, medians of {rounds}", ["step", "seconds", "anonymous MB at most"], rows))
    room = ROOM_MB + 2 * largest
    for name in ("ours: merge, convert", "ours, lean: f16 only"):
        mine = found[name]
        share = its / mine.seconds
        if size == TIMED:  # a larger one takes longer than that on any disk
            told = f"{mine.seconds:.1f} s, the original {its:.1f} s: {share:.1f} x"
            passed = mine.seconds <= WANTED_SECONDS or share >= 1 / WANTED_SHARE
            wanted = f"{WANTED_SECONDS:.0f} s or a third of the original's"
            result.figures.append(measuring.Figure(f"{size}: {name}", wanted, told, passed))
        result.at_most(f"{size}: {name}, anonymous memory", mine.anonymous_mb, room, " MB")
    if quantize:
        ratio = found["ours: quantize"].seconds / found["quantize"].seconds
        what = f"{size}: quantize against llama.cpp's own, no slower but for noise"
        result.at_most(what, ratio, measuring.NOISE, " x")


def main() -> int:
    """Measures and prints."""
    parser = measuring.options(__doc__)
    parser.add_argument("--sizes", default="1b,3b", help="1b, 3b or both, as 1b,3b; quantizing is measured at 1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-quantize", action="store_true", help="leave the quantizer out, which takes longest")
    parser.add_argument("--folder", type=Path, help="where the models lie meanwhile")
    arguments = parser.parse_args()
    result = Result("merge_convert", "From adapter to GGUF", quick=arguments.quick)
    result.versions = measuring.versions("torch", "transformers", "llama-cpp-python", "numpy")
    rounds = 1 if arguments.quick else arguments.rounds
    for size in ("tiny",) if arguments.quick else arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            quantize = size != "3b" and not arguments.no_quantize
            measure_size(size, Path(folder), rounds, quantize, result)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
