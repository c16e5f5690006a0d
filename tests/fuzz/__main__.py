"""`make fuzz`: run each parser on damaged inputs in a separate process, for its share of the minutes.

Inputs are guided by coverage if atheris is installed, otherwise mutated at random. A crash, a hang of more than 5
seconds or the use of more than 1 GB is a finding: it is kept as a file, and the exit code is 1. The figures are kept
for docs/reliability.md, which `python tests/faults report` writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = 100_000
_GUIDED = importlib.util.find_spec("atheris") is not None


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python tests/fuzz")
    arguments.add_argument("--minutes", type=float, default=30)
    arguments.add_argument("--only", help="one parser")
    arguments.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = arguments.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from support import figures

    from fuzz.targets import TARGETS

    parsers = [options.only] if options.only else list(TARGETS)
    options.findings.mkdir(exist_ok=True)
    inputs, failed = {}, []
    for name in parsers:
        code, inputs[name] = _child(name, options.minutes * 60 / len(parsers), options.findings.absolute())
        print(f"{name}: {inputs[name]} inputs, {'ok' if code == 0 else f'FAILED, see {options.findings}'}", flush=True)
        failed += [name] * (code != 0)
    if not options.only:
        counts = _round_trips()
        print(f"modelfile: {TEXTS} texts: {counts}", flush=True)
        summary = {"minutes": options.minutes, "guided": _GUIDED, "inputs": inputs, "failed": failed, "texts": counts}
        figures.write(figures.folder() / "fuzz.json", summary)
    return int(bool(failed))


def _child(name: str, seconds: float, findings: Path) -> tuple[int, int]:
    """Run one parser; return its exit code and the number of its inputs."""
    code = (
        f"from fuzz import loops; loops.{'guided' if _GUIDED else 'mutated'}({name!r}, {seconds!r}, {str(findings)!r})"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    with tempfile.TemporaryFile("w+") as file:
        ended = subprocess.run([sys.executable, "-c", code], env=env, check=False, stdout=file, stderr=file).returncode
        file.seek(0)
        text = file.read()
    if ended != 0:
        print(text[-5000:], flush=True)
    counted = re.search(r"number_of_executed_units: (\d+)|: (\d+) inputs", text)
    return ended, int(counted[1] or counted[2]) if counted else 0


def _round_trips() -> dict[str, int]:
    """Run the ordinary test of the Modelfile's round trip with 100,000 texts."""
    from unit.ollama.test_modelfile import check_round_trip

    return check_round_trip(TEXTS)


if __name__ == "__main__":
    sys.exit(main())
