"""`make fuzz`: each parser in a process of its own, for its share of the minutes.

Where atheris is installed, guided by coverage; else by mutation alone. No crash, no hang over 5 seconds, no more than
1 GB: a finding is kept as a file, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 5, 1000
TEXTS = 100_000


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python tests/fuzz")
    arguments.add_argument("--minutes", type=float, default=30)
    arguments.add_argument("--only", help="one parser")
    arguments.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    given = arguments.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from fuzz.targets import TARGETS

    wanted = [given.only] if given.only else list(TARGETS)
    given.findings.mkdir(exist_ok=True)
    failed = []
    for name in wanted:
        code = _child(name, given.minutes * 60 / len(wanted), given.findings.absolute())
        print(f"{name}: {'ok' if code == 0 else f'FAILED, see {given.findings}'}", flush=True)
        failed += [name] * (code != 0)
    if not given.only:
        counts = _round_trips()
        print(f"modelfile: {TEXTS} texts: {counts}", flush=True)
    return int(bool(failed))


def _child(name: str, seconds: float, findings: Path) -> int:
    kind = "guided" if importlib.util.find_spec("atheris") else "mutated"
    code = f"from fuzz import loops; loops.{kind}({name!r}, {seconds!r}, {str(findings)!r})"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


def _round_trips() -> dict[str, int]:
    """The ordinary test of the Modelfile's round trip, but for 100,000 texts."""
    from unit.ollama.test_modelfile import check_round_trip

    return check_round_trip(TEXTS)


if __name__ == "__main__":
    sys.exit(main())
