"""`kolotune plan`: show what a run would do and need."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from kolotune.foundation.errors import ConfigError
from kolotune.foundation.formatting import format_duration, format_size
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom
from kolotune.foundation.reporter import Reporter
from kolotune.planning.gaps import describe_gap
from kolotune.planning.network import LARGEST_SHARE, Traffic

from .options import drop_unset, reporter, resolve_flags, with_options
from .parameters import ConfigFile, Data, Json
from .settings import Verbose, show_settings

if TYPE_CHECKING:
    from kolotune.pipeline.plan import RunPlan


@with_options()
def plan(
    data: Data = None,
    config: ConfigFile = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Try some training steps, to estimate the time.")
    ] = True,
    link_mbit: Annotated[
        float | None, typer.Option(min=0.001, help="Megabits per second of the network between machines.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
    **flags: object,
) -> int:
    """Estimate the steps, memory, disk space and time of a run."""
    from kolotune.pipeline.plan import plan_run

    say = reporter(json)
    resolved = resolve_flags(flags, data, config)
    if not resolved.train_data:
        raise ConfigError("no training data was given", "Name a file: kolotune plan chats.jsonl")
    if not json:
        show_settings(resolved, say, drop_unset(flags), verbose=verbose)
    planned = plan_run(resolved, say, measure=measure, link=link_mbit)
    _show_plan(planned, say)
    if planned.problems:
        first = planned.problems[0]
        causes = "\n".join(problem.cause for problem in planned.problems)
        raise type(first)(causes, " ".join(dict.fromkeys(problem.hint for problem in planned.problems)))
    return 0


def _show_plan(planned: RunPlan, say: Reporter) -> None:
    say.table("What the run does", ("quantity", "value", "details"), _workload_rows(planned))
    if not planned.stages:
        say.success("everything is done: nothing it depends on has changed")
        return
    say.table(
        "What the run needs",
        ("stage", "peak memory", "of that, files", "on disk", "temporary", "time"),
        [_stage_row(planned, name) for name in [*(["start"] if planned.seconds else []), *planned.stages]],
    )
    for gap in planned.gaps:
        say.note(f"not known: {describe_gap(gap)}")
    needs, memory = planned.needs, planned.needs.largest_memory
    time = f", {format_duration(sum(planned.seconds.values()))}" if planned.seconds else ""
    gpu = ""
    if needs.gpu is not None:
        gpu = f"{format_size(needs.gpu.needed)} of the {format_size(needs.gpu.size)} of each GPU, "
    say.result(
        f"in total: {format_size(memory.resident)} of memory ({format_size(needs.free_memory)} free), {gpu}"
        f"{format_size(needs.peak)} of disk at the peak and {format_size(needs.end)} at the end "
        f"({format_size(needs.free_disk)} free){time}",
        plan=as_event(planned),
    )


def _workload_rows(planned: RunPlan) -> list[tuple[str, str, str]]:
    workload, facts, config = planned.workload, planned.facts, planned.config
    left_out = [
        f"{facts[name]} {label}"
        for name, label in (("duplicates", "copies"), ("too_long", "too long"), ("in_both_parts", "in both parts"))
        if facts.get(name)
    ]
    if isinstance(bad := facts.get("bad"), list) and bad:
        left_out.append(f"{len(bad)} bad")
    is_text = OBJECTIVES[config.objective].learns_from is LearnsFrom.TEXT
    units = "packed sequences" if is_text else "chats"
    batch_origin = f"chosen from the lengths and number of the {units}" if config.batch_size is None else "as given"
    shortened = f"{facts['shortened']} shortened" if facts.get("shortened") else ""
    conversion = {True: "yes", False: "no", None: "not asked"}[planned.converts]
    lengths = f"lengths {facts['shortest']} to {facts['longest']}, median {facts['median']}"
    answers = f"{100 * workload.labelled / max(1, workload.tokens):.0f}%"
    asked = "llama.cpp was asked with this model's shapes" if planned.converts is not None else ""
    held_out = f"{facts.get('held_out_chats', 0)} more are held out"
    rows = [
        ("documents" if is_text else "chats", f"{facts['chats']}", held_out),
        ("left out", ", ".join(left_out) or "none", shortened),
        ("tokens", f"{workload.tokens}", lengths),
        ("trained share", answers, "of the tokens carry loss" + ("" if is_text else ": the answers")),
        ("batch size", f"{workload.batch_size}", batch_origin),
        ("steps", f"{workload.steps}", f"{workload.steps_in_epoch} in each of {config.epochs} epochs"),
        ("warmup", f"{workload.warmup}", "steps in which the learning rate rises"),
        ("dtype", config.dtype, "of the frozen weights; the adapter is fp32"),
        ("conversion", conversion, asked),
    ]
    if is_text:
        packed = f"each with up to {config.max_seq_length} tokens, in {workload.sequences} pieces"
        rows.insert(1, ("packed sequences", f"{workload.chats}", packed))
    elif workload.sequences > workload.chats:
        rows.insert(1, ("sequences", f"{workload.sequences}", "each answer behind the prompt that it is served with"))
    if planned.needs.recomputes:
        offloaded = planned.needs.gpu.offloaded if planned.needs.gpu is not None else 0
        how = f"recomputed, with {format_size(offloaded)} of layers' inputs in the host's memory" if offloaded else ""
        rows.append(("activations", how or "recomputed", "keeping them would take too much of the free memory"))
    if planned.traffic is not None:
        rows.append(("traffic", f"{format_size(planned.traffic.step)} a step", describe_traffic(planned.traffic)))
    return rows


def describe_traffic(traffic: Traffic) -> str:
    """Return the time on the network, and the accumulation that would keep it short."""
    sent = "sent and received by each machine"
    if traffic.seconds is None:
        return sent
    if traffic.share is None or traffic.enough is None:
        return f"{sent}: {traffic.seconds:.2g} s"
    text = f"{sent}: {traffic.seconds:.2g} s, {100 * traffic.share:.0f}% of a step"
    if traffic.enough > traffic.accumulation:
        text += f"; --gradient-accumulation {traffic.enough} keeps it under {100 * LARGEST_SHARE:.0f}%"
    return text


def _stage_row(planned: RunPlan, name: str) -> tuple[str, ...]:
    memory, disk = planned.needs.memory.get(name), planned.needs.disk.get(name)
    seconds = planned.seconds.get(name)
    return (
        name,
        format_size(memory.resident) if memory else "-",
        format_size(memory.mapped) if memory else "-",
        format_size(disk.stays) if disk else "-",
        format_size(disk.passes) if disk and disk.passes else "-",
        format_duration(seconds) if seconds is not None else "-",
    )


def as_event(planned: RunPlan) -> dict[str, object]:
    """Return the plan as the fields of a JSON event, in bytes and seconds."""
    needs, traffic = planned.needs, planned.traffic
    return {
        "stages": planned.stages,
        "facts": planned.facts,
        "work": dataclasses.asdict(planned.workload),
        "dtype": planned.config.dtype,
        "conversion": planned.converts,
        "memory": {
            name: {**dataclasses.asdict(memory), "resident": memory.resident} if memory else None
            for name, memory in needs.memory.items()
        },
        "disk": {name: dataclasses.asdict(use) for name, use in needs.disk.items()},
        "memory_peak": needs.largest_memory.resident,
        "disk_peak": needs.peak,
        "disk_end": needs.end,
        "free_memory": needs.free_memory,
        "gpu_memory": needs.gpu and dataclasses.asdict(needs.gpu),
        "free_disk": needs.free_disk,
        "recomputes": needs.recomputes,
        "seconds": planned.seconds,
        "unknown": [describe_gap(gap) for gap in planned.gaps],
        "traffic": traffic and {**dataclasses.asdict(traffic), "share": traffic.share, "enough": traffic.enough},
        "problems": [{"cause": problem.cause, "hint": problem.hint} for problem in planned.problems],
    }
