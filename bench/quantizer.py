"""The sample to Q4_K_M: kolotune's quantizer beside llama.cpp's own function, as processes of their own.

    python bench/quantizer.py [--rounds N] [--json FILE] [--quick]

They take turns. Memory, which takes a tenth of a core to measure, is measured in a run of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environments
import material
from measuring import KOLOTUNE, NOISE, Result, Table, measure, median, options, versions

from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.gguf import header

OURS, THEIRS = "kolotune's quantizer", "llama_model_quantize"
QUANTIZATION = "Q4_K_M"


def largest_tensor_mb(source: Path, target: Path) -> float:
    """Return the MB of the largest tensor in both its forms."""
    before, after = header.read(source).tensors, header.read(target).tensors
    return max(before[name].size + after[name].size for name in before) / 1e6


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    result = Result("quantizer", "The quantizer", versions("xllamacpp"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "log")
        export = [*KOLOTUNE, "export", material.base(), "--output-dir", folder / "run", "--quantization", "none"]
        measure([*map(str, export), "--no-compare"], log, env=material.OFFLINE)
        source, made, expected = folder / "run" / "Merged.gguf", folder / "made.gguf", folder / "expected.gguf"
        job = json.dumps({"source": str(source), "target": str(expected), "type": FILE_TYPES[QUANTIZATION]})
        programs: dict[str, list[str | Path]] = {
            OURS: [sys.executable, "-P", "-m", "kolotune.gguf.quantizer", source, made, QUANTIZATION],
            THEIRS: [environments.ensure("llama_cpp") / "python", environments.PEERS / "quantize.py", job],
        }
        memory = {program: measure(argv, log) for program, argv in programs.items()}
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        for _ in range(rounds):
            for program, argv in programs.items():
                began = time.perf_counter()
                subprocess.run(argv, check=True, capture_output=True)
                seconds[program].append(time.perf_counter() - began)
        if made.read_bytes() != expected.read_bytes():
            raise RuntimeError("the files differ")
        largest = largest_tensor_mb(source, made)
    rows: list[list[object]] = [
        [program, median(seen), min(seen), max(seen), memory[program].anonymous_mb] for program, seen in seconds.items()
    ]
    columns = ["", "seconds", "fastest", "slowest", "peak anonymous MB"]
    result.tables.append(Table(f"SmolLM2-135M to {QUANTIZATION}, {rounds} rounds", columns, rows))
    ratio = median(seconds[OURS]) / median(seconds[THEIRS])
    result.at_most("time relative to llama.cpp's own, within noise", ratio, NOISE, " x")
    result.at_most("memory, at most the largest tensor's two forms", memory[OURS].anonymous_mb, largest, " MB")
    result.notes.append("Both write the same bytes.")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
