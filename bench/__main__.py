"""All measurements, one after the other, and what they found as `bench/RESULTS.md`.

    python bench [--quick] [--only NAME ...] [--results FOLDER]

Each script writes a JSON file to the folder of results; RESULTS.md is made of those that are there, and says of each
when and at which commit it was measured. With --quick it is printed and not written: too little was measured.
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
    "matrix_rate",
    "whole_job",
    "merge_convert",
    "preparing",
    "growth",
    "scaling",
    "plan_accuracy",
)
_FOLDER = Path(__file__).resolve().parent
_HEAD = """# Measurements

Made by `make bench`; see the scripts beside this file for what exactly is measured. Within a script the contenders take
turns, and medians are compared: an absolute figure moves from day to day, the ratio is what counts. Memory is the whole
process tree's, as `measuring.py` says. Whoever repeats this needs no account: the chats are the standard library's
docstrings, the model comes from the package index."""


def main() -> int:
    """Runs the scripts and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything really, but little of it")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--results", type=Path, default=_FOLDER / "results", help="folder of what each script found")
    arguments = parser.parse_args()
    folder = arguments.results / "quick" if arguments.quick else arguments.results
    failed = []
    for name in SCRIPTS:
        if name in arguments.only:
            print(f"\n# {name}", flush=True)
            result = folder / f"{name}.json"
            result.unlink(missing_ok=True)  # what is told must not be older than what was asked for
            argv = [sys.executable, str(_FOLDER / f"{name}.py"), "--json", str(result)]
            if subprocess.run([*argv, *(["--quick"] if arguments.quick else [])], cwd=ROOT, check=False).returncode:
                failed.append(name)
    files = [folder / f"{name}.json" for name in SCRIPTS]
    text = told([read_result(file) for file in files if file.is_file()], [f.stem for f in files if not f.is_file()])
    if arguments.quick:
        print(text)
    else:
        (_FOLDER / "RESULTS.md").write_text(text, encoding="utf-8")
        print(f"written: {_FOLDER / 'RESULTS.md'}")
    if failed:
        print(f"these scripts failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def told(results: list[Result], missing: list[str]) -> str:
    """RESULTS.md."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine().items())]
    figures: list[Figure] = [figure for result in results for figure in result.figures]
    passed = sum(figure.passed is True for figure in figures)
    parts = [_HEAD, "## The machine", "\n".join(lines), "## What must be shown", figures_table(figures)]
    parts.append(f"{passed} of {len(figures)} figures pass.")
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    for result in results:
        against = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        when = f"`{result.command}`, {result.date}, commit {result.commit}, load before {result.load_before}; {against}"
        parts += [f"## {result.title}", when, result.markdown()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
