"""Shared by all measurements: wall time and memory of a child, medians, the machine, results as tables and JSON.

Memory is that of the whole process tree. Every 50 ms it is sampled as the anonymous and shared memory of all processes
(`RssAnon` and `RssShmem`, which the kernel counts anyway), and every half second also as their share of mapped files
(`Pss_File`, which divides a page among the processes that map it). Reading that walks all page tables; doing it more
often would slow down the measured program. The peak is that of the sum; anonymous memory has a separate peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
NOISE = 1.03
"""The ratio by which two runs of one program may differ."""
KOLOTUNE = (sys.executable, "-P", "-m", "kolotune")
_SAMPLE_SECONDS = 0.05
_FILES_EVERY = 10  # samples
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Measured:
    """One run of a command: wall seconds, peak memory of its process tree in MB (10^6 bytes), exit code."""

    seconds: float
    peak_mb: float
    anonymous_mb: float
    code: int


def measure(
    argv: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    until: Callable[[], bool] | None = None,
    accepted: tuple[int, ...] = (0,),
    memory: bool = True,
) -> Measured:
    """Run a command and measure it.

    Args:
        argv: the command.
        log: file to append the output to.
        env: extra environment variables.
        cwd: working directory.
        until: called regularly; once it returns True, the child is ended, and its exit code counts as 0.
        accepted: exit codes that are not failures.
        memory: whether to measure memory, which takes a tenth of a core that the child may need. If not, it is 0.

    Raises:
        RuntimeError: the command failed; the message contains the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = anonymous = files = 0
    stopped = False
    with log.open("a", encoding="utf-8") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})}, cwd=cwd,
        )  # fmt: skip
        sample = 0
        while True:
            try:
                child.wait(_SAMPLE_SECONDS * (1 if memory else _FILES_EVERY))
                break
            except subprocess.TimeoutExpired:
                pass
            if (not memory or sample % _FILES_EVERY == 0) and until is not None and until():
                stopped = True
                _end(child, _tree(child.pid))
                break
            if not memory:
                continue
            tree = _tree(child.pid)
            if sample % _FILES_EVERY == 0:
                files = sum(_kilobytes(pid, "smaps_rollup", ("Pss_File:",)) for pid in tree)
            sample += 1
            now = sum(_kilobytes(pid, "status", ("RssAnon:", "RssShmem:")) for pid in tree)
            anonymous, peak = max(anonymous, now), max(peak, now + files)
        seconds = time.perf_counter() - started
    code = 0 if stopped else child.returncode
    if code not in accepted:
        last = log.read_text(encoding="utf-8", errors="replace")[-2_000:]
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit code {code}\n{last}")
    return Measured(seconds, peak * 1024 / 1e6, anonymous * 1024 / 1e6, code)


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(process.pid for process in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def _kilobytes(pid: int, file: str, keys: tuple[str, ...]) -> int:
    """Return the sum of the lines `keys` in a file of ``/proc``; 0 if the process has ended."""
    try:
        lines = Path("/proc", str(pid), file).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(keys))


def _end(child: subprocess.Popen[bytes], tree: Sequence[int]) -> None:
    """End the child, and its descendants if they outlive it."""
    descendants = []
    for pid in tree[1:]:
        try:
            descendants.append(psutil.Process(pid))
        except psutil.Error:
            continue
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for process in descendants:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(descendants, timeout=10)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def medians(runs: Sequence[Measured]) -> Measured:
    """Combine several runs of a command: the median of each number."""
    return Measured(
        median(run.seconds for run in runs),
        median(run.peak_mb for run in runs),
        median(run.anonymous_mb for run in runs),
        0,
    )


@dataclass(frozen=True)
class Figure:
    """A measured quantity with its target.

    Attributes:
        what: the measured quantity.
        target: as text, such as "at least 10 x".
        measured: the value as text.
        passed: None if it could not be measured.
    """

    what: str
    target: str
    measured: str
    passed: bool | None


@dataclass(frozen=True)
class Table:
    """A titled table; cells are text or numbers."""

    title: str
    columns: list[str]
    rows: list[list[object]]

    def markdown(self) -> str:
        """Return the table as Markdown, with three or four significant digits."""
        lines = [self.columns, ["---"] * len(self.columns), *([format_cell(cell) for cell in row] for row in self.rows)]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


@dataclass
class Result:
    """The result of one script."""

    name: str
    title: str
    versions: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quick: bool = False
    command: str = field(default_factory=lambda: " ".join(["python", *_own_command()]))
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    commit: str = field(default_factory=lambda: _commit())
    load_before: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    def at_least(self, what: str, value: float, target: float, unit: str = " x") -> None:
        """Add a figure with a lower bound."""
        self.figures.append(
            Figure(what, f"at least {format_cell(target)}{unit}", f"{format_cell(value)}{unit}", bool(value >= target))
        )

    def at_most(self, what: str, value: float, target: float, unit: str) -> None:
        """Add a figure with an upper bound."""
        self.figures.append(
            Figure(what, f"at most {format_cell(target)}{unit}", f"{format_cell(value)}{unit}", bool(value <= target))
        )

    def markdown(self) -> str:
        """Return tables, figures and notes as Markdown."""
        parts = [table.markdown() for table in self.tables]
        if self.figures:
            parts.append(figures_table(self.figures))
        parts += self.notes
        return "\n\n".join(parts)

    def finish(self, path: Path | None) -> None:
        """Print the result, and write it as JSON."""
        print(f"\n## {self.title}\n\n{self.markdown()}\n", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read a result that `Result.finish` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["tables"] = [Table(**table) for table in values["tables"]]
    values["figures"] = [Figure(**figure) for figure in values["figures"]]
    return Result(**values)


def figures_table(figures: Sequence[Figure]) -> str:
    """Return figures as a Markdown table."""
    verdicts = {True: "pass", False: "**fail**", None: "not measured"}
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    lines += [f"| {each.what} | {each.target} | {each.measured} | {verdicts[each.passed]} |" for each in figures]
    return "\n".join(lines)


def format_cell(value: object) -> str:
    """Format a number with its significant digits; return anything else as text."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.2f}"


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="measure everything, but only briefly: a minute or two")
    return parser


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages in this environment."""
    return {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "instructions": ", ".join(flag for flag in _FLAGS if flag in flags) or "none of the listed ones",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "llama.cpp": f"that of xllamacpp {importlib.metadata.version('xllamacpp')}",
    }


def _own_command() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    return [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name, *sys.argv[1:]]


def _commit() -> str:
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"
