"""Memory runs out in training: the micro-batch is halved, steps stay the same, and a repetition gives the same bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.control_groups import MemoryGroup
from support.runs import losses, states
from support.training import random_chats, write_tokens

from kolotune.engines.events import StepDone, event_in
from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import TrainingError
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.memory_backoff import write_memory_backoff
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.runs.rebuild import rebuild
from kolotune.stages import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not count the processes that its kernel killed."""
    monkeypatch.setattr(hardware, "_KILL_COUNTERS", ())


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Kill the engine's process after it has reported a step: ``killed_at(3)``; or after each of several steps."""

    def at(*steps: int) -> list[int]:
        killed: list[int] = []
        run = local.run

        def watched(argv: Any, *, on_line: Any = None, **more: Any) -> int:
            def look(line: str) -> bool:
                event = event_in(line)
                if isinstance(event, StepDone) and len(killed) < len(steps) and event.step >= steps[len(killed)]:
                    for child in psutil.Process().children():
                        if any("kolotune.engines" in word for word in child.cmdline()):
                            killed.append(event.step)
                            child.kill()
                return bool(on_line(line))

            return run(argv, on_line=look if on_line else None, **more)

        monkeypatch.setattr(local, "run", watched)
        return killed

    return at


def of_training(config: Config) -> tuple[dict[int, float], dict[str, Any]]:
    """Return the loss curve and the facts of the record."""
    run = RunFolder(config.output_dir)
    record = read_record(run, "train")
    assert record is not None
    return losses(run.metrics), record.facts


@pytest.mark.usefixtures("uncounted")
def test_a_killed_training_resumes_with_half_the_batch(
    config_in: Callable[..., Config], killed_at: Callable[..., list[int]], reporter: PlainReporter, capsys: Any
) -> None:
    # With a small learning rate: AdamW amplifies differences of the last bits at every step.
    whole, broken = (config_in(name, epochs=8, learning_rate=1e-4) for name in ("whole", "broken"))
    run_pipeline(whole, reporter, ["prepare", "train"])
    killed = killed_at(5)
    run_pipeline(broken, reporter, ["prepare", "train"])
    assert killed == [5]
    printed = capsys.readouterr().out
    assert "micro-batches of 2 chats instead of 4" in printed
    assert "resuming from step" in printed
    curve, facts = of_training(broken)
    expected, undisturbed = of_training(whole)
    assert "halved_from" not in undisturbed
    first = int(facts["halved_from"])
    assert first >= 3  # the newest checkpoint; the engine may have been some steps ahead
    assert {step: loss for step, loss in curve.items() if step <= first} == dict(list(expected.items())[:first])
    assert curve == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")
def test_a_rebuild_uses_the_same_micro_batches_and_gets_the_same_bits(
    config_in: Callable[..., Config], killed_at: Callable[..., list[int]], reporter: PlainReporter, tmp_path: Path
) -> None:
    broken = config_in("broken", epochs=8, learning_rate=1e-4)
    killed_at(5)
    run_pipeline(broken, reporter)
    curve, facts = of_training(broken)
    assert rebuild(RunFolder(broken.output_dir).manifest, tmp_path / "again", reporter).different == []
    assert of_training(config_in("again"))[1]["halved_from"] == facts["halved_from"]
    assert losses(tmp_path / "again" / "metrics.jsonl") == curve


@pytest.mark.skipif(hardware.kills_for_memory() is None, reason="this system does not count kills for lack of memory")
def test_a_kill_by_somebody_is_an_error_and_halves_nothing(
    config_in: Callable[..., Config], killed_at: Callable[..., list[int]], reporter: PlainReporter, capsys: Any
) -> None:
    config = config_in("run", epochs=4)
    killed = killed_at(5)
    with pytest.raises(TrainingError, match="SIGKILL") as raised:
        run_pipeline(config, reporter, ["prepare", "train"])
    assert killed == [5] and "--use-checkpoint" in raised.value.hint
    assert not RunFolder(config.output_dir).memory_backoff.exists()
    run_pipeline(dataclasses.replace(config, use_checkpoint=True), reporter, ["train"])
    assert "resuming from step" in capsys.readouterr().out
    assert "halved_from" not in of_training(config)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")
def test_with_a_batch_of_one_the_hint_names_options(
    config_in: Callable[..., Config], killed_at: Callable[..., list[int]], reporter: PlainReporter, capsys: Any
) -> None:
    config = config_in("run", epochs=5, batch_size=2)
    killed = killed_at(1, 5)
    with pytest.raises(TrainingError, match="memory ran out") as raised:
        run_pipeline(config, reporter, ["prepare", "train"])
    assert len(killed) == 2
    for word in ("--use-checkpoint", "--max-seq-length", "--lora-rank", "--load-in-4bit", "--base-model"):
        assert word in raised.value.hint
    assert "--batch-size" not in raised.value.hint
    assert states(RunFolder(config.output_dir))["train"] == "failed"
    # The halvings are remembered: a second call does not start with a larger micro-batch.
    run_pipeline(dataclasses.replace(config, use_checkpoint=True), reporter, ["train"])
    assert "resuming from step" in capsys.readouterr().out
    assert len(of_training(config)[1]["halved_from"].split(",")) == 1
    assert list(of_training(config)[0]) == list(range(1, 31))


Train = Callable[..., tuple[dict[int, float], dict[str, Any], str]]


@pytest.fixture
def wide_head(tiny_model: Callable[..., Any], reporter: PlainReporter, monkeypatch: Any, tmp_path: Path) -> Train:
    """Train a model whose logits take most of the memory, with 8 chats in a batch.

    ``wide_head(name, prefix=(), halvings=[], **options)`` returns the losses, the facts and the adapter's hash.
    The engine's command begins with `prefix`; `halvings` are the steps at which memory is known to have run out.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # With this activation, transformers computes it: all logits at once.
    tiny_model("gemma2", tmp_path / "base", vocab_size=60_000, hidden_activation="gelu")
    chats = random_chats(8, 1, shortest=180, longest=200)
    real = local.run

    def trained(
        name: str, prefix: Sequence[str] = (), halvings: Sequence[int] = (), **options: Any
    ) -> tuple[dict[int, float], dict[str, Any], str]:
        run = RunFolder(tmp_path / name)
        write_tokens(run.prepared / "train.safetensors", chats)
        chosen = {
            "base_model": str(tmp_path / "base"), "output_dir": run.root, "dtype": "fp32", "epochs": 1,
            "batch_size": 8, "lora_rank": 2, "compile": "off", **options,
        }  # fmt: skip
        context = Context(configs.resolve((chosen, "test", tmp_path)), run, tmp_path / "base")
        if halvings:
            write_memory_backoff(run, halvings)
        with monkeypatch.context() as patch:
            patch.setattr(local, "run", lambda argv, **more: real([*prefix, *argv], **more))
            facts = train.run(context, reporter)
        return losses(run.metrics), facts, hash_file(run.adapter / "adapter_model.safetensors")

    return trained


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_by_the_kernel_itself(
    processes: int, wide_head: Train, memory_group: Callable[[], MemoryGroup], capsys: Any
) -> None:
    """The engine's processes together get less memory than 8 chats at once take, and more than fewer chats do."""
    known = [0] * processes  # each of two processes has 4 of the chats, so the first backoff changes nothing
    measured = memory_group()
    known_run = wide_head("known", measured.prefix, known, nproc=processes)
    limited = memory_group()
    limited.limit(measured.peak + (300 << 20))
    kills = hardware.kills_for_memory()
    curve, facts, adapter = wide_head("limited", limited.prefix, nproc=processes)
    assert kills is not None and hardware.kills_for_memory() != kills, "the kernel did not kill it"
    printed = capsys.readouterr()
    assert "micro-batches of 4 chats" in printed.out + printed.err
    halvings = [int(step) for step in facts["halved_from"].split(",")]
    if halvings != known:  # the process took more than expected, and was killed once more
        known_run = wide_head("known again", halvings=halvings, nproc=processes)
    assert (curve, adapter) == (known_run[0], known_run[2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_an_allocation_that_fails(wide_head: Train, monkeypatch: Any) -> None:
    """The engine gets less address space than eight long chats at once take, and more than one does."""
    peaks: list[int] = []
    show = train._show_event

    def watched(event: Any, *others: Any) -> None:
        if isinstance(event, StepDone):
            peaks.extend(child.memory_info().vms for child in psutil.Process().children())
        show(event, *others)

    monkeypatch.setattr(train, "_show_event", watched)
    whole, _, _ = wide_head("whole")
    peaks.clear()
    wide_head("small", halvings=[0, 0, 0])
    limit = max(peaks) + (300 << 20)
    curve, facts, adapter = wide_head("limited", ["prlimit", f"--as={limit}"])
    assert facts["halved_from"].startswith("0")
    assert curve == pytest.approx(whole, abs=1e-5)
    halvings = [int(step) for step in facts["halved_from"].split(",")]
    assert wide_head("known", halvings=halvings)[2] == adapter


def test_a_control_group_counts_only_its_own_kills(memory_group: Callable[[], MemoryGroup]) -> None:
    group = memory_group()
    group.limit(200 << 20)
    script = """
import subprocess, sys
from kolotune.foundation.hardware import kills_for_memory
before = kills_for_memory(own=True)
killed = subprocess.run([sys.executable, "-c", "bytearray(b'x') * (1 << 30)"])
print(killed.returncode, kills_for_memory(own=True) - before)
"""
    before, all_before = hardware.kills_for_memory(own=True), hardware.kills_for_memory()
    done = subprocess.run([*group.prefix, sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["-9", "1"], done.stderr
    assert hardware.kills_for_memory(own=True) == before
    assert hardware.kills_for_memory() != all_before
