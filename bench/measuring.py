"""What all measurements share: a child's wall time and memory, medians, the machine, and results as tables and JSON.

Memory is the whole process tree's: every 50 ms the anonymous and shared memory of all its processes (`RssAnon` and
`RssShmem`, which the kernel counts anyway), and every half second also the part of mapped files that falls to them
(`Pss_File`: a page that several processes map is divided among them; finding that out walks all page tables, and done
more often it would slow down what is measured). The peak is that of the sum. Anonymous memory's own peak stands beside.
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
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
NOISE = 1.03
"""By how much two runs of one program differ."""
KOLOTUNE = (sys.executable, "-P", "-m", "kolotune")
_SAMPLE_SECONDS = 0.05
_FILES_EVERY = 10  # samples
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Measured:
    """One run of a command: wall seconds, peak memory of its process tree in MB (10^6 bytes), its exit code."""

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
    fine: tuple[int, ...] = (0,),
    memory: bool = True,
) -> Measured:
    """Runs a command as a child and watches it.

    Args:
        argv: the command.
        log: file that its output is appended to.
        env: variables in addition to this process's own.
        cwd: folder it is started in.
        until: asked now and then; once it says True, the child is ended, and its code counts as 0.
        fine: exit codes that are no failure.
        memory: watch it; looking takes a tenth of a core, which a child that uses all of them lacks. False: it is 0.

    Raises:
        RuntimeError: it failed; the message has the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = anonymous = files = 0
    stopped = False
    with log.open("a", encoding="utf-8") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            [str(each) for each in argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
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
    if code not in fine:
        last = log.read_text(encoding="utf-8", errors="replace")[-2_000:]
        raise RuntimeError(f"{' '.join(str(each) for each in argv)}: exit code {code}\n{last}")
    return Measured(seconds, peak * 1024 / 1e6, anonymous * 1024 / 1e6, code)


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(each.pid for each in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def _kilobytes(pid: int, file: str, keys: tuple[str, ...]) -> int:
    """The sum of the lines `keys` in a process's file of counts; 0 when it has ended."""
    try:
        lines = Path("/proc", str(pid), file).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(keys))


def _end(child: subprocess.Popen[Any], tree: Sequence[int]) -> None:
    """Ends our child, and its children if they outlive it."""
    rest = []
    for pid in tree[1:]:
        try:
            rest.append(psutil.Process(pid))
        except psutil.Error:
            continue
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for each in rest:
        with contextlib.suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(rest, timeout=10)


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def medians(runs: Sequence[Measured]) -> Measured:
    """Several runs of one command as one: the median of each number."""
    return Measured(
        median(each.seconds for each in runs),
        median(each.peak_mb for each in runs),
        median(each.anonymous_mb for each in runs),
        0,
    )


@dataclass(frozen=True)
class Figure:
    """One line of what must be shown.

    Attributes:
        what: the measured quantity.
        wanted: the threshold in words, such as "at least 10 x".
        measured: the value in words.
        passed: None when it could not be measured.
    """

    what: str
    wanted: str
    measured: str
    passed: bool | None


@dataclass(frozen=True)
class Table:
    """Rows under a title; cells are text or numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """The table as Markdown, numbers with three or four digits that matter."""
        lines = [self.columns, ["---"] * len(self.columns), *([shown(each) for each in row] for row in self.rows)]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


@dataclass
class Result:
    """What one script found."""

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

    def at_least(self, what: str, value: float, wanted: float, unit: str = " x") -> None:
        """Notes a figure that must not be smaller."""
        self.figures.append(
            Figure(what, f"at least {shown(wanted)}{unit}", f"{shown(value)}{unit}", bool(value >= wanted))
        )

    def at_most(self, what: str, value: float, wanted: float, unit: str) -> None:
        """Notes a figure that must not be larger."""
        self.figures.append(
            Figure(what, f"at most {shown(wanted)}{unit}", f"{shown(value)}{unit}", bool(value <= wanted))
        )

    def markdown(self) -> str:
        """Tables, figures and notes."""
        parts = [each.markdown() for each in self.tables]
        if self.figures:
            parts.append(figures_table(self.figures))
        parts += self.notes
        return "\n\n".join(parts)

    def finish(self, path: Path | None) -> None:
        """Prints the result, and writes it as JSON."""
        print(f"\n## {self.title}\n\n{self.markdown()}\n", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """A result that `Result.finish` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["tables"] = [Table(**each) for each in values["tables"]]
    values["figures"] = [Figure(**each) for each in values["figures"]]
    return Result(**values)


def figures_table(figures: Sequence[Figure]) -> str:
    """Figures as Markdown."""
    words = {True: "pass", False: "**fail**", None: "not measured"}
    lines = ["| what | wanted | measured | |", "|---|---|---|---|"]
    lines += [f"| {each.what} | {each.wanted} | {each.measured} | {words[each.passed]} |" for each in figures]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A number in as many digits as matter; anything else as it is."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.2f}"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--quick", action="store_true", help="everything really, but little of it: a minute or two")
    return parser


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages of this environment."""
    return {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "instructions": ", ".join(each for each in _FLAGS if each in flags) or "none of those looked for",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "llama.cpp": f"that of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
    }


def _own_command() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    return [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name, *sys.argv[1:]]


def _commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
