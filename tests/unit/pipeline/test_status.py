"""What runs again, and why: each change gives work to exactly the stages that depend on it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import config_of

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.reasons import Reason, ReasonKind


def to_run(run: RunFolder, **changes: Any) -> dict[str, list[Reason]]:
    """Return the stages that have reasons to run; without those that only wait for a stage before them."""
    statuses = read_status(run, config_of(run, **changes) if changes else None)
    return {status.name: list(status.reasons) for status in statuses if status.reasons}


def option(name: str, before: object, after: object) -> Reason:
    return Reason(ReasonKind.OPTION_CHANGED, name, before, after)


def changed(label: str) -> Reason:
    return Reason(ReasonKind.INPUT_CHANGED, label)


def altered(name: str) -> Reason:
    return Reason(ReasonKind.OUTPUT_ALTERED, name)


def missing(name: str) -> Reason:
    return Reason(ReasonKind.OUTPUT_MISSING, name)


def test_times_and_the_clock_do_not_count(run_copy: RunFolder, monkeypatch: Any) -> None:
    for seconds in (0, 4_000_000_000):
        for path in [*run_copy.root.rglob("*"), run_copy.root.parent / "chats.jsonl"]:
            os.utime(path, (seconds, seconds))
        assert to_run(run_copy) == {}
    real = time.time
    for shift in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        assert to_run(run_copy) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_seq_length": 99}, {"prepare": [option("max_seq_length", 2048, 99)]}),
        ({"eval_split": 0.5}, {"prepare": [option("eval_split", 0.05, 0.5)]}),
        ({"skip_bad": True}, {"prepare": [option("skip_bad", False, True)]}),
        ({"epochs": 2}, {"train": [option("epochs", 1, 2)]}),
        ({"learning_rate": 0}, {"train": [option("learning_rate", 0.0002, 0.0)]}),
        ({"target_modules": "q_proj"}, {"train": [option("target_modules", ["all-linear"], ["q_proj"])]}),
        ({"merge_dtype": "bf16"}, {"merge": [option("merge_dtype", "f16", "bf16")]}),
        ({"system": "Be kind."}, {"modelfile": [option("system", None, "Be kind.")]}),
        ({"parameter": ["temperature=0.1"]}, {"modelfile": [option("parameter", [], ["temperature=0.1"])]}),
        ({"checkpoint_steps": 7, "use_checkpoint": True, "compare": False}, {}),
    ],
)
def test_an_option_redoes_exactly_the_stages_that_use_it(
    run_copy: RunFolder, changes: dict[str, Any], expected: dict[str, list[Reason]]
) -> None:
    assert to_run(run_copy, **changes) == expected


def test_a_different_quantization_never_retrains(run_copy: RunFolder) -> None:
    assert set(to_run(run_copy, quantization="Q8_0")) == {"quantize", "modelfile"}
    assert set(to_run(run_copy, quantization="none")) == {"quantize", "modelfile"}


def test_data_decides_by_content_by_number_and_by_order(
    run_copy: RunFolder, write_chats: Callable[..., Path], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    (tmp_path / "elsewhere").mkdir()
    same = shutil.copyfile(chats, tmp_path / "elsewhere" / "chats.jsonl")
    assert to_run(run_copy, train_data=[same]) == {}
    with chats.open("a") as file:
        file.write(" \n")
    assert to_run(run_copy) == {"prepare": [changed("training data 1 (chats.jsonl)")]}
    shutil.copyfile(same, chats)
    more = write_chats(2, "more.jsonl", first=50)
    assert to_run(run_copy, train_data=[chats, more]) == {"prepare": [changed("training data 2 (more.jsonl)")]}
    assert list(to_run(run_copy, eval_data=[more], eval_split=0)) == ["prepare"]
    assert list(to_run(run_copy, train_data=[more, chats])) == ["prepare"]
    chats.unlink()
    assert list(to_run(run_copy)) == ["prepare"]


def test_a_data_file_that_is_removed_or_has_a_namesake_counts(
    run_copy: RunFolder, write_chats: Callable[..., Path], tmp_path: Path, reporter: PlainReporter
) -> None:
    (tmp_path / "two").mkdir()
    namesake = shutil.copyfile(write_chats(2, "more.jsonl", first=50), tmp_path / "two" / "chats.jsonl")
    both = [tmp_path / "chats.jsonl", namesake]
    run_pipeline(config_of(run_copy, train_data=both), reporter, ["prepare"])
    assert set(to_run(run_copy)) == {"train"}
    assert set(to_run(run_copy, train_data=both[:1])) == {"prepare", "train"}
    assert set(to_run(run_copy, train_data=both[::-1])) == {"prepare", "train"}
    with both[0].open("a") as file:
        file.write("\n")
    assert set(to_run(run_copy)) == {"prepare", "train"}


def test_a_base_model_of_the_same_shape_counts(
    run_copy: RunFolder, tiny_base: Path, other_weights: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    assert to_run(run_copy, base_model=str(other)) == {}
    shutil.copyfile(other_weights, other / "model.safetensors")
    expected = {"train": [changed("the base model")], "merge": [changed("the base model")]}
    assert to_run(run_copy, base_model=str(other)) == expected
    weights = bytearray((tiny_base / "model.safetensors").read_bytes())
    weights[-1000] ^= 1  # one bit: no library notices it
    (other / "model.safetensors").write_bytes(weights)
    assert to_run(run_copy, base_model=str(other)) == expected


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "stage", "reason"),
    [
        (lambda run: _flip(run.gguf), "convert", altered("Merged.gguf")),
        (lambda run: run.gguf.unlink(), "convert", missing("Merged.gguf")),
        (lambda run: os.truncate(run.gguf, 5000), "convert", altered("Merged.gguf")),
        (lambda run: _flip(run.quantized("Q4_K_M")), "quantize", altered("MergedQ4_K_M.gguf")),
        (lambda run: _flip(run.adapter / "adapter_model.safetensors"), "train", altered("adapter")),
        (lambda run: (run.adapter / "adapter_config.json").unlink(), "train", altered("adapter")),
        (lambda run: shutil.rmtree(run.merged_model), "merge", missing("merged_model")),
        (lambda run: run.modelfile().write_text("FROM x"), "modelfile", altered("Modelfile")),
        (lambda run: shutil.rmtree(run.prepared), "prepare", missing(".kolotune/prepared")),
        (lambda run: run.record("convert").unlink(), "convert", Reason(ReasonKind.NEVER_RAN)),
        (lambda run: os.truncate(run.record("train"), 100), "train", Reason(ReasonKind.NEVER_RAN)),
        (lambda run: run.record("merge").write_bytes(b"\0" * 700), "merge", Reason(ReasonKind.NEVER_RAN)),
    ],
)
def test_damage_is_found_and_named(run_copy: RunFolder, spoil: Any, stage: str, reason: Reason) -> None:
    assert to_run(run_copy) == {}
    spoil(run_copy)
    reasons = to_run(run_copy)
    assert reason in reasons[stage]
    # A stage that reads what was damaged has a reason too; nothing else has work.
    kinds = (ReasonKind.INPUT_CHANGED, ReasonKind.OUTPUT_ALTERED)
    assert all(each[0].kind in kinds for name, each in reasons.items() if name != stage)


def test_a_damaged_saved_config_is_a_config_error_with_its_line(run_copy: RunFolder) -> None:
    run_copy.config.write_text("epochs: 1\nlora_rank: [\n")
    with pytest.raises(KolotuneError, match=r"config.yaml:3: not valid YAML"):
        read_status(run_copy)


def test_a_run_folder_may_be_moved(run_copy: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    moved = RunFolder(run_copy.root.rename(tmp_path / "deep" / "moved run é"))
    assert to_run(moved) == {}
