"""docs/reliability.md, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import figures

from faults import containers
from faults.campaign import Tally
from faults.loop import SUBJECTS, Loops
from faults.room import CHATS, INTERVAL, STEPS

_HEAD = f"""# Reliability

Written by `make faults`; what stands here was measured, and a later call goes on with it. The run is a whole one,
from chats to Modelfiles and their comparison, on a random Llama of two layers: {CHATS} chats, {STEPS} training steps
in fp32 with one thread, dropout and shuffling on, a checkpoint every {INTERVAL} steps and after each epoch; every
fifth run has the comparison. A random kill is the signal of a timer of processor time, which ends a process at any
instruction, and SIGKILL for the rest of its group. `make test-all` has a short form of each row; `make test` has the
faults that need no repetition: full disks, no inodes, read-only folders, lost tails, damaged checkpoints, two runs at
once, signals, memory that runs out in training, and a kill at each system call of the writer of records.
"""

_TESTED = """## What ordinary tests show

Each stands in `make test`, but for what is marked `slow` (`make test-all`) and the container's, which want a Docker
engine (`make test-container`). The figures are those that the tests themselves count with.
"""
Row = tuple[str, str, str]
"""What, its figure, and the command that shows it."""


def page(kept: Path) -> str:
    """The page.

    Args:
        kept: the folder of what was measured.
    """
    rows = [*_kills(Tally.read(kept / "kills.json")), *_calls(kept / "calls.json")]
    rows += [row for name in SUBJECTS for row in _loop(name, Loops.read(kept / f"loop-{name}.json"))]
    rows += _fuzzing(figures.read(kept / "fuzz.json"))
    rows += _container(containers.Tally.read(kept / "container.json"))
    return f"{_HEAD}\n{_table(rows)}\n{_TESTED}\n{_table(_tested())}"


def _table(rows: Sequence[Row]) -> str:
    table = "".join(f"| {what} | {figure} | `{command}` |\n" for what, figure, command in rows)
    return f"| what | figure | command |\n|---|---|---|\n{table}"


def _kills(tally: Tally) -> list[Row]:
    command = "python tests/faults kills"
    if not tally.kills:
        return [("random kills", "not measured", command)]
    where = _counts(tally.by_stage)
    kinds = f"{tally.groups} of the whole process group, {tally.alone} of the main process alone, {tally.children} of "
    kinds += "what it had started (engine, quantizer, comparison)"
    over = tally.steps - tally.runs * STEPS
    return [
        ("random kills", f"{tally.kills}: {kinds}", command),
        ("stage at work when it came", where, command),
        ("runs that were killed until they were through", f"{tally.runs}, each with the undisturbed hashes", command),
        ("false “done”, outputs lost, finished stages run again", f"{len(tally.broken)}", command),
        (
            "training steps computed again",
            f"{over} of {tally.steps}; at most {tally.most_lost:.1f} for a kill, on a run's average",
            command,
        ),
        ("a killed process's children are gone after", f"{tally.longest:.2f} s at most", command),
    ]


def _container(tally: containers.Tally) -> list[Row]:
    command = "python tests/faults container"
    if not tally.kills:
        return [("clients killed while a verb ran in the container", "not measured", command)]
    mean = tally.total / tally.kills
    return [
        ("clients killed while a verb ran in the container", f"{tally.kills}: {_counts(tally.by_verb)}", command),
        ("stage at work in there when a run's client was killed", _counts(tally.by_stage), command),
        ("processes left behind in the container (orphans)", f"{tally.orphans}", command),
        (
            "the last process in there was gone after",
            f"{tally.longest:.1f} s at most, {mean:.1f} s on average",
            command,
        ),
        (
            "runs whose clients were killed until they were through",
            f"{tally.runs}, each with the undisturbed hashes",
            command,
        ),
        ("stages in there told to be done that ran again, other results", f"{len(tally.broken)}", command),
    ]


def _counts(found: dict[str, int]) -> str:
    """How often each, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda each: -each[1]))


def _calls(file: Path) -> list[Row]:
    command = "python tests/faults calls"
    found = figures.read(file)
    if not found:
        return [("kills at system calls that change the folder", "not measured", command)]
    rows = []
    for name, each in found.items():
        part = f", every {each['every']}th of them" if each["every"] > 1 else ""
        rows.append((f"system calls of {name}", f"{each['points']}{part}; killed at {each['killed']}", command))
    return rows


def _loop(name: str, seen: Loops) -> list[Row]:
    command = f"python tests/faults loop --subject {name}"
    what = f"`kolotune run` of the {name}, killed until it finishes"
    if not seen.times:
        return [(what, "not measured", command)]
    figure = f"{seen.times} times, each with the undisturbed hashes and losses; {seen.kills} kills, at most "
    figure += f"{seen.most_kills} in one run; {seen.again} of {seen.steps * seen.times} steps computed again, where "
    figure += f"{seen.interval} for each kill were allowed; an undisturbed run took {seen.seconds:.0f} s, the longest "
    figure += f"{seen.longest:.0f} s"
    return [(what, figure, command)]


def _fuzzing(found: dict[str, Any]) -> list[Row]:
    if not found:
        return [("fuzzing", "not measured", "make fuzz")]
    inputs, way = found["inputs"], "guided by coverage" if found["guided"] else "by mutation"
    command = f"make fuzz MINUTES={found['minutes']:g}"
    figure = f"{sum(inputs.values())} inputs for {len(inputs)} parsers in {found['minutes']:g} minutes, {way}; "
    figure += f"{len(found['failed'])} parsers crashed, took over 5 s or more than 1 GB"
    texts = ", ".join(f"{count} {name}" for name, count in found["texts"].items())
    return [("fuzzing", figure, command), ("Modelfiles of any text", f"{texts}; none other than it was", command)]


def _tested() -> list[Row]:
    """The rows that tests show; the figures are their own."""
    from support.hostile import TEXTS
    from unit import test_corruption
    from unit.chats import test_damage

    corrupted = len(test_corruption.ARTIFACTS)
    bad = len(test_damage.BAD_LINES) + len(test_damage.FILES)
    engines = "tests/unit/engines"
    return [
        (
            "resume",
            "interrupted after every step, and killed: losses and adapter bit for bit, dropout and shuffling on",
            f"pytest {engines}/native/test_training.py -k 'interrupted or killed'",
        ),
        (
            "the same with torchtune",
            "after each epoch",
            f"pytest {engines}/torchtune/test_training.py -k 'bit or killed'",
        ),
        (
            "corruption",
            f"{test_corruption.COUNT} seeded damages of each of {corrupted} kinds of artifact, of records and of "
            "checkpoints: all caught before use; of files without a hash: refused or read, nothing breaks",
            "pytest tests/unit/test_corruption.py",
        ),
        (
            "chats",
            f"{bad} bad lines and files: exact line, no traceback, the good chats beside them are read",
            "pytest tests/unit/chats/test_damage.py",
        ),
        (
            "hostile text",
            f"{len(TEXTS)} strings in every text input: no shell, no way out of a folder",
            "pytest tests/unit/test_hostile.py",
        ),
        (
            "secrets",
            "a planted token is in no file, argument, message or crash: verbs, engines (slow), container",
            "pytest -m '' tests/unit/test_planted_token.py tests/container/test_secrets.py",
        ),
        (
            "static",
            "no shell, no unsafe YAML or pickle, no code of a model's; each of these tests is seen to fail",
            "pytest tests/unit/test_static.py",
        ),
        (
            "container",
            "not root, no ssh, nobody listens, loopback ports, base pinned by a digest that is a build argument",
            "pytest -m container tests/container/test_secrets.py tests/container/test_image.py",
        ),
        (
            "a container that is paused, restarted, stopped, removed, full; Docker that goes down",
            "in mid-stage: told within seconds with what to do, and the same command finishes, with the same results",
            "pytest -m container tests/container/test_disturbed.py tests/container/test_space.py",
        ),
    ]
