"""docs/reliability.md, from what was measured."""

from __future__ import annotations

from pathlib import Path

from support import figures

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


def page(kept: Path) -> str:
    """The page.

    Args:
        kept: the folder of what was measured.
    """
    rows = [*_kills(Tally.read(kept / "kills.json")), *_calls(kept / "calls.json")]
    rows += [row for name in SUBJECTS for row in _loop(name, Loops.read(kept / f"loop-{name}.json"))]
    table = "".join(f"| {what} | {figure} | `{command}` |\n" for what, figure, command in rows)
    return f"{_HEAD}\n| what | figure | command |\n|---|---|---|\n{table}"


def _kills(tally: Tally) -> list[tuple[str, str, str]]:
    command = "python tests/faults kills"
    if not tally.kills:
        return [("random kills", "not measured", command)]
    where = ", ".join(f"{name} {count}" for name, count in sorted(tally.by_stage.items(), key=lambda each: -each[1]))
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


def _calls(file: Path) -> list[tuple[str, str, str]]:
    command = "python tests/faults calls"
    found = figures.read(file)
    if not found:
        return [("kills at system calls that change the folder", "not measured", command)]
    rows = []
    for name, each in found.items():
        part = f", every {each['every']}th of them" if each["every"] > 1 else ""
        rows.append((f"system calls of {name}", f"{each['points']}{part}; killed at {each['killed']}", command))
    return rows


def _loop(name: str, seen: Loops) -> list[tuple[str, str, str]]:
    command = f"python tests/faults loop --subject {name}"
    what = f"`kolotune run` of the {name}, killed until it finishes"
    if not seen.times:
        return [(what, "not measured", command)]
    figure = f"{seen.times} times, each with the undisturbed hashes and losses; {seen.kills} kills, at most "
    figure += f"{seen.most_kills} in one run; {seen.again} of {seen.steps * seen.times} steps computed again, where "
    figure += f"{seen.interval} for each kill were allowed; an undisturbed run took {seen.seconds:.0f} s, the longest "
    figure += f"{seen.longest:.0f} s"
    return [(what, figure, command)]
