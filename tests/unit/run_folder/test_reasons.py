"""Why a stage runs again: each change has its own reason, and nothing but content counts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from support.fake_stage import FakeStage

from kolotune.foundation.config import stage_options
from kolotune.foundation.hashing import Hasher
from kolotune.pipeline.reason_text import format_reason
from kolotune.run_folder.reasons import Reason, ReasonKind, find_reasons
from kolotune.run_folder.records import now, package_versions, write_record
from kolotune.run_folder.stage import Context

_NEVER_RAN = [Reason(ReasonKind.NEVER_RAN)]


def reasons(stage: FakeStage, context: Context) -> list[Reason]:
    return find_reasons(stage, dataclasses.replace(context, hasher=Hasher()))


def test_no_record_and_a_true_record(stage: FakeStage, context: Context) -> None:
    assert reasons(stage, context) == []
    context.run.record("fake").unlink()
    assert reasons(stage, context) == _NEVER_RAN


def test_each_change_has_its_own_reason(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    stage.chosen = {"lora_rank": 9, "quantization": ["Q4_K_M", "Q8_0"]}
    assert reasons(stage, context) == [Reason(ReasonKind.OPTION_CHANGED, "lora_rank", 8, 9)]
    stage.chosen["lora_rank"] = 8
    (tmp_path / "in").write_text("other")
    assert reasons(stage, context) == [Reason(ReasonKind.INPUT_CHANGED, "the input")]
    (tmp_path / "in").unlink()
    assert reasons(stage, context) == [Reason(ReasonKind.INPUT_CHANGED, "the input")]
    (tmp_path / "in").write_text("input")
    assert reasons(stage, context) == []
    (context.run.adapter / "more").write_text("")
    assert reasons(stage, context) == [Reason(ReasonKind.OUTPUT_ALTERED, "adapter")]
    (context.run.adapter / "more").unlink()
    context.run.gguf.write_text("outpux")
    assert reasons(stage, context) == [Reason(ReasonKind.OUTPUT_ALTERED, "Merged.gguf")]
    context.run.gguf.unlink()
    assert reasons(stage, context) == [Reason(ReasonKind.OUTPUT_MISSING, "Merged.gguf")]


def test_a_young_option_is_recorded_unless_it_has_its_default(stage: FakeStage, context: Context) -> None:
    def chosen(value: str) -> list[Reason]:
        config = dataclasses.replace(context.config, empty_thoughts=value)  # type: ignore[arg-type]
        stage.chosen = stage_options(config, "prepare")
        return reasons(stage, context)

    chosen("mask")
    assert "empty_thoughts" not in stage.chosen and stage.chosen
    write_record(stage, context, {}, now())
    assert chosen("mask") == []
    assert chosen("learn") == [Reason(ReasonKind.OPTION_CHANGED, "empty_thoughts", None, "learn")]
    write_record(stage, context, {}, now())
    assert chosen("learn") == []
    assert chosen("mask") == [Reason(ReasonKind.OPTION_CHANGED, "empty_thoughts", "learn", "mask")]


def test_all_reasons_are_found(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    stage.chosen = {"lora_rank": 1, "quantization": ()}
    (tmp_path / "in").write_text("other")
    context.run.gguf.unlink()
    assert len(reasons(stage, context)) == 4


def test_an_added_or_removed_input_counts(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    (tmp_path / "more").write_text("more")
    both = {**stage.files, "more data": tmp_path / "more"}
    stage.files, alone = both, stage.files
    assert reasons(stage, context) == [Reason(ReasonKind.INPUT_CHANGED, "more data")]
    write_record(stage, context, {}, now())
    stage.files = alone
    assert reasons(stage, context) == [Reason(ReasonKind.INPUT_NOT_GIVEN, "more data")]


def test_an_output_that_was_not_requested_before_counts(stage: FakeStage, context: Context) -> None:
    stage.made.append(context.run.quantized("Q8_0"))
    assert reasons(stage, context) == [Reason(ReasonKind.OUTPUT_MISSING, "MergedQ8_0.gguf")]
    context.run.quantized("Q8_0").write_text("from elsewhere")
    assert reasons(stage, context) == [Reason(ReasonKind.OUTPUT_ALTERED, "MergedQ8_0.gguf")]


def test_a_changed_version_counts_and_a_missing_package_does_not(stage: FakeStage, context: Context) -> None:
    record = context.run.record("fake")
    fields = json.loads(record.read_text())
    fields["versions"] = {"pydantic": "0.1"}
    del fields["sha256"]  # of the record as it was
    record.write_text(json.dumps(fields))
    (reason,) = reasons(stage, context)
    assert (reason.kind, reason.name, reason.before) == (ReasonKind.VERSION_CHANGED, "pydantic", "0.1")
    stage.needs = ("no-such-package",)
    assert package_versions(stage) == {"no-such-package": "-"}
    assert reasons(stage, context) == []


def test_times_do_not_count(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    for path in (tmp_path / "in", context.run.gguf, context.run.adapter / "part", context.run.record("fake")):
        for time in (0, 2**31, 10**10):
            os.utime(path, (time, time))
            assert reasons(stage, context) == []


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (Reason(ReasonKind.NEVER_RAN), "it has not run yet"),
        (Reason(ReasonKind.OPTION_CHANGED, "merge_dtype", "f16", "bf16"), "merge-dtype changed from f16 to bf16"),
        (Reason(ReasonKind.OPTION_CHANGED, "system", None, "Be kind."), "system changed from nothing to Be kind."),
        (Reason(ReasonKind.OPTION_CHANGED, "quantization", ["Q8_0", "Q6_K"], []), "from Q8_0, Q6_K to nothing"),
        (Reason(ReasonKind.INPUT_CHANGED, "the adapter"), "the adapter changed"),
        (Reason(ReasonKind.INPUT_CHANGED, "what training measured"), "metrics.jsonl changed"),
        (Reason(ReasonKind.INPUT_NOT_GIVEN, "the tokenizer"), "the tokenizer is no longer given"),
        (Reason(ReasonKind.VERSION_CHANGED, "torch", "1.0", "2.0"), "torch changed from 1.0 to 2.0"),
        (Reason(ReasonKind.OUTPUT_MISSING, "adapter"), "adapter is missing"),
        (Reason(ReasonKind.OUTPUT_ALTERED, "adapter"), "adapter was changed since it was made"),
    ],
)
def test_each_reason_has_a_sentence(reason: Reason, text: str) -> None:
    assert format_reason(reason).endswith(text)
