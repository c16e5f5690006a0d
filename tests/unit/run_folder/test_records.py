"""Records: nothing but a true one is read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from typing import Any

import pytest
from support.fake_stage import FakeStage

from kolotune.run_folder.reasons import Reason, ReasonKind, find_reasons
from kolotune.run_folder.records import Record, now, read_record
from kolotune.run_folder.stage import Context


def test_the_record_names_sizes_hashes_versions_and_facts(stage: FakeStage, context: Context) -> None:
    record = read_record(context.run, "fake")
    assert record is not None
    assert record.outputs["Merged.gguf"].size == len("output")
    assert len(record.outputs["adapter"].sha256) == 64
    assert record.versions == {"pydantic": importlib.metadata.version("pydantic")}
    assert record.facts == {"loss": 1.5}
    assert record.options["quantization"] == ["Q4_K_M", "Q8_0"]
    assert record.started <= record.finished


def test_a_record_cut_anywhere_is_no_record(stage: FakeStage, context: Context) -> None:
    path = context.run.record("fake")
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):  # the last byte is the newline
        path.write_bytes(whole[:cut])
        assert read_record(context.run, "fake") is None
    path.write_bytes(b"\0" * len(whole))
    assert find_reasons(stage, context) == [Reason(ReasonKind.NEVER_RAN)]


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Record)])
@pytest.mark.parametrize("value", [None, [], "text", 5, {"x": None}])
def test_a_field_of_the_wrong_type_never_raises(stage: FakeStage, context: Context, name: str, value: Any) -> None:
    path = context.run.record("fake")
    fields = json.loads(path.read_text())
    fields[name] = value
    del fields["sha256"]  # of the record as it was
    path.write_text(json.dumps(fields))
    reasons = find_reasons(stage, context)
    if name in ("options", "inputs", "versions", "outputs"):
        assert reasons


def test_a_record_that_was_changed_is_no_record(stage: FakeStage, context: Context) -> None:
    path = context.run.record("fake")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"facts": {"final_loss": 0.1}}))
    assert read_record(context.run, "fake") is None
    path.write_text(json.dumps(fields))
    assert read_record(context.run, "fake") is not None
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "sha256"}))
    assert read_record(context.run, "fake") is not None  # early versions wrote no seal


@pytest.mark.parametrize("text", ["[]", "{}", "null", "5", '{"stage": "fake"}', '{"unknown": 1}', "[" * 100_000])
def test_json_that_is_no_record_is_no_record(stage: FakeStage, context: Context, text: str) -> None:
    context.run.record("fake").write_text(text)
    assert read_record(context.run, "fake") is None


def test_the_time_is_utc_to_the_second() -> None:
    assert now().endswith("+00:00")
    assert len(now()) == 25
