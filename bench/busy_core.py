"""Training, quantizing and comparing with all cores free, and beside another process that keeps one of them busy.

    python bench/busy_core.py [--rounds N] [--earlier PYTHON] [--json FILE] [--quick]

The other process is a plain loop at the same priority. Idle and busy take turns, and so do the programs. With
--earlier, the Python of an environment that has an earlier kolotune, that one takes part. Its number of threads is
that of the cores for both, as it is for users: OMP_NUM_THREADS is not set.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import material
from measuring import KOLOTUNE, NOISE, Result, Table, measure, median, options, versions

from kolotune.foundation.errors import FidelityError
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import read_metrics

OURS, EARLIER = "kolotune", "an earlier kolotune"
_OFFLINE = {name: value for name, value in material.OFFLINE.items() if name != "OMP_NUM_THREADS"}
_ACCEPTED = (0, FidelityError.exit_code)  # an adapter with so little training may fail; only the time matters here
_SHARE = 0.75


@contextlib.contextmanager
def a_busy_core() -> Iterator[None]:
    """Keep one core busy while the block runs."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            yield
        finally:
            child.kill()


class Program:
    """One kolotune with a run folder of its own.

    Args:
        argv: how it is started.
        chats: what it trains on.
        folder: for the run and the log.
    """

    def __init__(self, argv: tuple[str, ...], chats: material.Chats, folder: Path) -> None:
        self._argv, self._run, self._log = argv, folder / "run", folder / "log"
        settings = material.settings(
            dtype="auto", eval_split=None, eval_data=chats.held_out, quantization="Q4_K_M"
        )  # in which a processor is fast
        self._do("run", str(chats.train), *settings, "--output-dir", str(self._run), "--no-compare")
        self.training_speed()  # the first one finds nothing in a cache

    def training_speed(self) -> float:
        """Train; return the tokens per second of the median step."""
        self._again("train")
        lines = read_metrics(RunFolder(self._run).metrics)
        return median(line.tokens_per_second for line in lines if line.loss is not None)

    def quantizing_speed(self) -> float:
        """Quantize; return how often that could be done in a second."""
        return 1 / self._again("quantize")

    def comparing_speed(self) -> float:
        """Compare; return how often that could be done in a second."""
        return 1 / self._again("compare")

    def complete(self) -> None:
        """Make what follows a training."""
        for verb in ("merge", "convert", "quantize", "modelfile"):
            self._do(verb, str(self._run))

    def _again(self, stage: str) -> float:
        """Run a stage although nothing that it depends on has changed; return its seconds."""
        RunFolder(self._run).record(stage).unlink(missing_ok=True)
        return self._do(stage, str(self._run))

    def _do(self, *arguments: str) -> float:
        """Run a verb; return its seconds."""
        argv = [*self._argv, *arguments]
        return measure(argv, self._log, env=_OFFLINE, accepted=_ACCEPTED, memory=False).seconds


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--earlier", type=Path, metavar="PYTHON", help="of an environment with an earlier kolotune")
    arguments = parser.parse_args()
    rounds, count = (1, 16) if arguments.quick else (arguments.rounds, 48)
    result = Result("busy_core", "Beside a busy process", versions("torch", "xllamacpp"), quick=arguments.quick)
    argvs = {OURS: KOLOTUNE}
    if arguments.earlier:
        argvs[EARLIER] = (str(arguments.earlier), "-P", "-m", "kolotune")
    seen: dict[tuple[str, str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        chats = material.chats(root, count, held_out=8)
        programs = {
            program: Program(argv, chats, root / str(number)) for number, (program, argv) in enumerate(argvs.items())
        }
        for _ in range(rounds):
            _measure(programs, lambda program: program.training_speed(), "train", seen)
            for program in programs.values():
                program.complete()
            _measure(programs, lambda program: program.quantizing_speed(), "quantize", seen)
            _measure(programs, lambda program: program.comparing_speed(), "compare", seen)
    _report(result, seen, rounds)
    result.finish(arguments.json)
    return 0


def _measure(
    programs: dict[str, Program],
    speed: Callable[[Program], float],
    what: str,
    seen: dict[tuple[str, str, bool], list[float]],
) -> None:
    for is_busy in (False, True):
        for name, program in programs.items():
            with a_busy_core() if is_busy else contextlib.nullcontext():
                seen.setdefault((what, name, is_busy), []).append(speed(program))
            print(f"{what}, {name}, {'busy' if is_busy else 'idle'}: {seen[what, name, is_busy][-1]:.4g}", flush=True)


def _report(result: Result, seen: dict[tuple[str, str, bool], list[float]], rounds: int) -> None:
    rows = []
    for what, name in dict.fromkeys((what, name) for what, name, _ in seen):
        idle, busy = median(seen[what, name, False]), median(seen[what, name, True])
        unit = (idle, busy) if what == "train" else (1 / idle, 1 / busy)
        rows.append([what, name, *unit, 100 * busy / idle])
        if name == OURS:
            result.at_least(f"{what} beside a busy process, relative to idle", busy / idle, _SHARE)
    title = f"One of {os.cpu_count()} cores busy, {rounds} rounds; tokens/s of train, seconds of the others"
    result.tables.append(Table(title, ["", "program", "idle", "busy", "speed kept %"], rows))
    for what in dict.fromkeys(what for what, _, _ in seen):
        if (what, EARLIER, False) in seen:
            ratio = median(seen[what, OURS, False]) / median(seen[what, EARLIER, False])
            result.at_least(f"{what}, idle, relative to {EARLIER}, within noise", ratio, 1 / NOISE)


if __name__ == "__main__":
    raise SystemExit(main())
