"""The verb that tells what a run would take: plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from kolotune.foundation.errors import ConfigError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.planning.network import MOST_SHARE, Traffic

from .options import ConfigFile, Data, Json, config_of, reporter, show, with_options

if TYPE_CHECKING:
    from kolotune.pipeline.plan import Plan

_DAY, _HOUR, _MINUTE = 86_400, 3_600, 60


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    app.command()(plan)


@with_options("data", "model", "training", "machines", "export")
def plan(
    data: Data = None,
    config: ConfigFile = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Do some steps of the training, to know the time.")
    ] = True,
    link_mbit: Annotated[
        Optional[float], typer.Option(min=0.001, help="Megabits a second of the network between machines.")  # noqa: UP045
    ] = None,
    json: Json = False,
    **flags: Any,
) -> int:
    """What a run would take: steps, memory, disk, time; and what to change where it can't fit. Makes nothing."""
    from kolotune.pipeline import plan as plans

    say = reporter(json)
    resolved = config_of(flags, data, config)
    if not resolved.train_data:
        raise ConfigError("no training data was given", "Name a file: kolotune plan chats.jsonl")
    if not json:
        show(resolved, say)
    made = plans.make(resolved, say, measure=measure, link=link_mbit)
    _tell(made, say)
    if made.problems:
        first = made.problems[0]
        causes = "\n".join(each.cause for each in made.problems)
        raise type(first)(causes, " ".join(dict.fromkeys(each.hint for each in made.problems)))
    return 0


def _tell(made: Plan, say: Reporter) -> None:
    say.table("What is done", ("what", "how much", "why"), _work_rows(made))
    if not made.stages:
        say.success("everything is done: nothing it depends on has changed")
        return
    say.table(
        "What it takes",
        ("stage", "memory at its peak", "of that, files", "new on the disk", "for a while", "time"),
        [_stage_row(made, name) for name in [*(["start"] if made.seconds else []), *made.stages]],
    )
    for each in made.unknown:
        say.note(f"not known: {each}")
    needs, most = made.needs, made.needs.most
    took = f", {time_in_words(sum(made.seconds.values()))}" if made.seconds else ""
    say.result(
        f"in all: {format_size(most.resident)} of memory ({format_size(needs.free_memory)} free), "
        f"{format_size(needs.peak)} of disk at the peak and {format_size(needs.end)} in the end "
        f"({format_size(needs.free_disk)} free){took}",
        plan=as_event(made),
    )


def _work_rows(made: Plan) -> list[tuple[str, str, str]]:
    work, facts, config = made.work, made.facts, made.config
    left_out = [
        f"{facts[name]} {words}"
        for name, words in (
            ("duplicates", "copies"), ("too_long", "too long"), ("in_both_parts", "in both parts"),
        )
        if facts.get(name)
    ] + ([f"{len(facts['bad'])} bad"] if facts.get("bad") else [])  # fmt: skip
    automatic = "follows from the chats' lengths and number" if config.batch_size is None else "as given"
    converted = {True: "yes", False: "no", None: "not asked"}[made.converts]
    rows = [
        ("chats", f"{work.chats}", f"{facts.get('held_out_chats', 0)} more are held out"),
        (
            "left out",
            ", ".join(left_out) or "none",
            f"{facts['shortened']} shortened" if facts.get("shortened") else "",
        ),
        ("tokens", f"{work.tokens}", f"lengths {facts['shortest']} to {facts['longest']}, median {facts['median']}"),
        ("trained share", f"{100 * work.labelled / max(1, work.tokens):.0f}%", "of the tokens carry loss: the answers"),
        ("batch size", f"{work.batch_size}", automatic),
        ("steps", f"{work.steps}", f"{work.steps_in_epoch} in each of {config.epochs} epochs"),
        ("warmup", f"{work.warmup}", "steps in which the learning rate rises"),
        ("arithmetic", config.dtype, "of the frozen weights; the adapter is fp32"),
        ("conversion", converted, "llama.cpp was asked with this model's shapes" if made.converts is not None else ""),
    ]
    if made.needs.recomputes:
        rows.append(("activations", "computed twice", "they would take more than half of the free memory"))
    if made.traffic is not None:
        rows.append(("traffic", f"{format_size(made.traffic.step)} a step", _traffic(made.traffic)))
    return rows


def _traffic(found: Traffic) -> str:
    """What the network between the machines takes, and what would make that little."""
    each = "from and to each machine"
    if found.seconds is None:
        return each
    if found.share is None or found.enough is None:
        return f"{each}: {found.seconds:.2g} s"
    words = f"{each}: {found.seconds:.2g} s, {100 * found.share:.0f}% of a step"
    if found.enough > found.accumulation:
        words += f"; --gradient-accumulation {found.enough} keeps it under {100 * MOST_SHARE:.0f}%"
    return words


def _stage_row(made: Plan, name: str) -> tuple[str, ...]:
    memory, disk = made.needs.memory.get(name), made.needs.disk.get(name)
    seconds = made.seconds.get(name)
    return (
        name,
        format_size(memory.resident) if memory else "-",
        format_size(memory.mapped) if memory else "-",
        format_size(disk.stays) if disk else "-",
        format_size(disk.passes) if disk and disk.passes else "-",
        time_in_words(seconds) if seconds is not None else "-",
    )


def as_event(made: Plan) -> dict[str, Any]:
    """The plan as it stands in an event: bytes and seconds."""
    needs = made.needs
    return {
        "stages": made.stages,
        "facts": made.facts,
        "work": dataclasses.asdict(made.work),
        "dtype": made.config.dtype,
        "conversion": made.converts,
        "memory": {
            name: {**dataclasses.asdict(each), "resident": each.resident} if each else None
            for name, each in needs.memory.items()
        },
        "disk": {name: dataclasses.asdict(each) for name, each in needs.disk.items()},
        "memory_peak": needs.most.resident,
        "disk_peak": needs.peak,
        "disk_end": needs.end,
        "free_memory": needs.free_memory,
        "free_disk": needs.free_disk,
        "recomputes": needs.recomputes,
        "seconds": made.seconds,
        "unknown": made.unknown,
        "traffic": None if made.traffic is None else _traffic_event(made.traffic),
        "problems": [{"cause": each.cause, "hint": each.hint} for each in made.problems],
    }


def _traffic_event(found: Traffic) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "share": found.share, "enough": found.enough}


def time_in_words(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        return f"{seconds / _HOUR:.1f} h"
    return f"{seconds / _DAY:.1f} days"
