"""Run all measurements one after the other, and write the results to `RESULTS.md` in the results folder.

    python bench [--quick] [--only NAME ...] [--results FOLDER]

Each script writes a JSON file to the results folder. RESULTS.md is made from the files that exist, and says when and at
which commit each was measured. With --quick it is only printed, because too little was measured. The pages beside this
file are kept by hand: they have figures of several machines and days, and what was found on the way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from measuring import ROOT, Figure, Result, figures_table, machine, read_result

SCRIPTS = (
    "answering",
    "training_speed",
    "preferences",
    "families",
    "matrix_rate",
    "gpu",
    "busy_core",
    "whole_job",
    "merge_convert",
    "quantizer",
    "preparing",
    "answers_apart",
    "serving",
    "growth",
    "scaling",
    "plan_accuracy",
)
_FOLDER = Path(__file__).resolve().parent
_HEAD = """# Measurements

Made by `make bench`. The scripts beside this file define what is measured. Within a script the programs take turns, and
their medians are compared: absolute figures vary from day to day, so look at the ratios. Memory is that of the whole
process tree; see `measuring.py`. You need no account to repeat this: the chats are docstrings of the standard library,
and the model comes from the package index."""


def main() -> int:
    """Run the scripts and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run every measurement, but only briefly")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--results", type=Path, default=_FOLDER / "results", help="folder for the results")
    arguments = parser.parse_args()
    folder = arguments.results / "quick" if arguments.quick else arguments.results
    failed = []
    for name in SCRIPTS:
        if name in arguments.only:
            print(f"\n# {name}", flush=True)
            result = folder / f"{name}.json"
            result.unlink(missing_ok=True)  # never report an old result
            argv = [sys.executable, str(_FOLDER / f"{name}.py"), "--json", str(result)]
            if subprocess.run([*argv, *(["--quick"] if arguments.quick else [])], cwd=ROOT, check=False).returncode:
                failed.append(name)
    files = [folder / f"{name}.json" for name in SCRIPTS]
    results = [read_result(file) for file in files if file.is_file()]
    text = format_results(results, missing=[file.stem for file in files if not file.is_file()])
    if arguments.quick:
        print(text)
    else:
        page = folder / "RESULTS.md"
        page.write_text(text, encoding="utf-8")
        print(f"written: {page}")
    if failed:
        print(f"these scripts failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def format_results(results: list[Result], missing: list[str]) -> str:
    """Return the text of RESULTS.md."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine().items())]
    figures: list[Figure] = [figure for result in results for figure in result.figures]
    passed = sum(figure.passed is True for figure in figures)
    parts = [_HEAD, "## The machine", "\n".join(lines), "## Targets", figures_table(figures)]
    parts.append(f"{passed} of {len(figures)} targets are met.")
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    for result in results:
        packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        origin = f"`{result.command}`, {result.date}, commit {result.commit}, load before {result.load_before}"
        parts += [f"## {result.title}", f"{origin}; {packages}", result.markdown()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
