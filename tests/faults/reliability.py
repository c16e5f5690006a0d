"""docs/reliability.md, from the measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import figures

from faults import containers
from faults.campaign import Tally
from faults.loop import SUBJECTS, LoopTally
from faults.workspace import CHATS, INTERVAL, STEPS

_HEAD = f"""# Reliability

`make faults` writes this page from its measurements, and each call adds to the figures. Each run goes through all
stages, from chats to Modelfiles, on a random Llama of two layers: {CHATS} chats, {STEPS} training steps in fp32 with
one thread, dropout and shuffling on, a checkpoint every {INTERVAL} steps and after each epoch; every fifth run includes
the comparison. A random kill is a signal from a timer of processor time, which can end a process at any instruction,
and SIGKILL for the rest of its group. `make test-all` has a short form of each row; `make test` covers the faults
that need no repetition: full disks, no inodes, read-only folders, files that lost their tails, damaged
checkpoints, two runs at once, signals, memory that runs out in training, and a kill at each system call of the
writer of records.
"""

_TESTED = """## Ordinary tests

`make test` runs these tests, except those marked `slow` (`make test-all`) and those of the container, which need a
Docker engine (`make test-container`). The figures are constants of the tests themselves.
"""
Row = tuple[str, str, str]
"""A subject, its figure, and the command that shows it."""


_ROW = re.compile(r"^\| (.*) \| (.*) \| `(.*)` \|$", re.MULTILINE)
_NOT_MEASURED = "not measured"
_CALLS = "python tests/faults calls"


def page(folder: Path, before: str = "") -> str:
    """Return the page.

    Args:
        folder: with the measurements.
        before: the page as it was: what is not in the folder, since it was measured elsewhere, stays.
    """
    rows = [*_kills(Tally.read(folder / "kills.json")), *_calls(folder / "calls.json")]
    rows += [row for name in SUBJECTS for row in _loop(name, LoopTally.read(folder / f"loop-{name}.json"))]
    rows += _fuzzing(figures.read(folder / "fuzz.json"))
    rows += _container(containers.ClientTally.read(folder / "container.json"))
    return f"{_HEAD}\n{_table(_with_earlier(rows, before))}\n{_TESTED}\n{_table(_tested())}"


def _with_earlier(rows: Sequence[Row], before: str) -> list[Row]:
    """Return rows, with those of an earlier page for what was not measured, and for stages that were not."""
    earlier = [(what, figure, command) for what, figure, command in _ROW.findall(before.partition(_TESTED)[0])]
    merged: dict[str, Row] = {}
    for what, figure, command in rows:
        old = {row[0]: row for row in earlier if row[2].startswith(command)}
        if figure == _NOT_MEASURED:
            merged |= old or {what: (what, figure, command)}
            continue
        if command == _CALLS:
            merged |= {stage: row for stage, row in old.items() if stage not in merged}
        merged[what] = what, figure, command
    return list(merged.values())


def _table(rows: Sequence[Row]) -> str:
    table = "".join(f"| {what} | {figure} | `{command}` |\n" for what, figure, command in rows)
    return f"| what | figure | command |\n|---|---|---|\n{table}"


def _kills(tally: Tally) -> list[Row]:
    command = "python tests/faults kills"
    if not tally.kills:
        return [("random kills", _NOT_MEASURED, command)]
    where = _counts(tally.by_stage)
    kinds = f"{tally.groups} of the whole process group, {tally.alone} of the main process alone, {tally.children} of "
    kinds += "its children (engine, quantizer, comparison)"
    over = tally.steps - tally.runs * STEPS
    return [
        ("random kills", f"{tally.kills}: {kinds}", command),
        ("running stage when it was killed", where, command),
        ("runs that were killed until they finished", f"{tally.runs}, each with the undisturbed hashes", command),
        ("stages falsely “done”, lost outputs, finished stages that ran again", f"{len(tally.broken)}", command),
        (
            "training steps computed again",
            f"{over} of {tally.steps}; at most {tally.most_lost:.1f} per kill, as the average of a run",
            command,
        ),
        ("time until the children of a killed process ended", f"{tally.longest:.2f} s at most", command),
    ]


def _container(tally: containers.ClientTally) -> list[Row]:
    command = "python tests/faults container"
    if not tally.kills:
        return [("clients killed while a verb ran in the container", _NOT_MEASURED, command)]
    mean = tally.total / tally.kills
    return [
        ("clients killed while a verb ran in the container", f"{tally.kills}: {_counts(tally.by_verb)}", command),
        ("running stage when a run's client was killed", _counts(tally.by_stage), command),
        ("processes left behind in the container (orphans)", f"{tally.orphans}", command),
        (
            "time until the last process in the container ended",
            f"{tally.longest:.1f} s at most, {mean:.1f} s on average",
            command,
        ),
        (
            "runs whose clients were killed until they finished",
            f"{tally.runs}, each with the undisturbed hashes",
            command,
        ),
        ("finished stages that ran again, or other results", f"{len(tally.broken)}", command),
    ]


def _counts(counts: dict[str, int]) -> str:
    """Format counts, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda count: -count[1]))


def _calls(file: Path) -> list[Row]:
    measured = figures.read(file)
    if not measured:
        return [("kills at system calls that change the folder", _NOT_MEASURED, _CALLS)]
    rows = []
    for name, calls in measured.items():
        part = f", one in {calls['every']} of all" if calls["every"] > 1 else ""
        rows.append((f"system calls of {name}", f"{calls['points']}{part}; killed at {calls['killed']}", _CALLS))
    return rows


def _loop(name: str, tally: LoopTally) -> list[Row]:
    command = f"python tests/faults loop --subject {name}"
    what = f"`kolotune run` of the {name}, killed until it finishes"
    if not tally.times:
        return [(what, _NOT_MEASURED, command)]
    figure = f"{tally.times} times, each with the undisturbed hashes and losses; {tally.kills} kills, at most "
    figure += (
        f"{tally.most_kills} in one run; {tally.again} of {tally.steps * tally.times} steps computed again, where "
    )
    figure += f"{tally.interval} per kill were allowed; an undisturbed run took {tally.seconds:.0f} s, the longest "
    figure += f"{tally.longest:.0f} s"
    return [(what, figure, command)]


def _fuzzing(measured: dict[str, Any]) -> list[Row]:
    if not measured:
        return [("fuzzing", _NOT_MEASURED, "make fuzz")]
    inputs, method = measured["inputs"], "guided by coverage" if measured["guided"] else "by mutation"
    command = f"make fuzz MINUTES={measured['minutes']:g}"
    figure = f"{sum(inputs.values())} inputs for {len(inputs)} parsers in {measured['minutes']:g} minutes, {method}; "
    figure += f"{len(measured['failed'])} parsers crashed, took over 5 s or more than 1 GB"
    texts = ", ".join(f"{count} {name}" for name, count in measured["texts"].items())
    return [("fuzzing", figure, command), ("Modelfiles of any text", f"{texts}; none was changed", command)]


def _tested() -> list[Row]:
    """Return the rows of ordinary tests, with the figures that those use."""
    from support.hostile import TEXTS
    from unit import test_corruption
    from unit.chats.reading import test_damage

    corrupted = len(test_corruption.ARTIFACTS)
    bad = len(test_damage.BAD_LINES) + len(test_damage.FILES)
    engines = "tests/unit/engines"
    return [
        (
            "resume",
            "interrupted after each step, and killed: same losses and adapter, bit for bit, with dropout and shuffling",
            f"pytest {engines}/native/test_training.py -k 'interrupted or killed'",
        ),
        (
            "the same with torchtune",
            "after each epoch",
            f"pytest {engines}/torchtune/test_driver.py -k 'bit or killed'",
        ),
        (
            "corruption",
            f"{test_corruption.COUNT} seeded damages of each of {corrupted} kinds of artifact, of records and of "
            "checkpoints: all caught before use; files without a hash are refused or read, without a crash",
            "pytest tests/unit/test_corruption.py",
        ),
        (
            "chats",
            f"{bad} bad lines and files: the exact line is reported, without a traceback, and the good chats are read",
            "pytest tests/unit/chats/reading/test_damage.py",
        ),
        (
            "hostile text",
            f"{len(TEXTS)} strings in every text input: no shell command runs, no file outside the folder is touched",
            "pytest tests/unit/test_hostile.py",
        ),
        (
            "secrets",
            "no file, argument, message or crash report of verbs, engines (slow) and container has a planted token",
            "pytest -m '' tests/unit/test_planted_token.py tests/container/test_secrets.py",
        ),
        (
            "static",
            "no shell, no unsafe YAML or pickle, no code of a model; each of these tests is shown to be able to fail",
            "pytest tests/unit/test_static.py",
        ),
        (
            "container",
            "not root, no ssh, no listening process, ports on the loopback, a base image pinned by its digest",
            "pytest -m container tests/container/test_secrets.py tests/container/test_image.py",
        ),
        (
            "a container that is paused, restarted, stopped, removed or full; a Docker that stops",
            "during a stage: reported within seconds with a hint, and the same command finishes with the same results",
            "pytest -m container tests/container/test_disturbed.py tests/container/test_space.py",
        ),
    ]
