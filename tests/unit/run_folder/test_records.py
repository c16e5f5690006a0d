"""Records: why a stage runs again, and that nothing but a true record says "done"."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation.config import Config
from kolotune.foundation.files import Hasher
from kolotune.run_folder import records
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import Context


@dataclass
class FakeStage:
    """A stage of which everything can be set."""

    NAME: str = "fake"
    DOING: str = "faking"
    chosen: dict[str, Any] = field(default_factory=lambda: {"lora_rank": 8, "quantization": ("Q4_K_M", "Q8_0")})
    files: dict[str, Path] = field(default_factory=dict)
    made: list[Path] = field(default_factory=list)
    needs: Sequence[str] = ("pydantic",)

    def options(self, config: Config) -> dict[str, Any]:
        return self.chosen

    def inputs(self, context: Context) -> dict[str, Path]:
        return self.files

    def outputs(self, context: Context) -> list[Path]:
        return self.made

    def packages(self) -> Sequence[str]:
        return self.needs

    def preflight(self, context: Context, reporter: Any) -> None: ...

    def run(self, context: Context, reporter: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    run = RunFolder(tmp_path / "run")
    run.state.mkdir(parents=True)
    return Context(Config(), run, tmp_path)


@pytest.fixture
def stage(context: Context, tmp_path: Path) -> FakeStage:
    """A stage that has run and whose record is written."""
    (tmp_path / "in").write_text("input")
    context.run.gguf.write_text("output")
    context.run.adapter.mkdir()
    (context.run.adapter / "part").write_text("output")
    fake = FakeStage(files={"the input": tmp_path / "in"}, made=[context.run.gguf, context.run.adapter])
    records.write(fake, context, Hasher(), {"loss": 1.5}, records.now())
    return fake


def why(stage: FakeStage, context: Context) -> list[str]:
    return records.reasons(stage, context, Hasher())


def test_no_record_and_a_true_record(stage: FakeStage, context: Context) -> None:
    assert why(stage, context) == []
    context.run.record("fake").unlink()
    assert why(stage, context) == ["it has not run yet"]


def test_the_record_names_sizes_hashes_versions_and_facts(stage: FakeStage, context: Context) -> None:
    import importlib.metadata

    record = records.read(context.run, "fake")
    assert record is not None
    assert record.outputs["Merged.gguf"]["size"] == len("output")
    assert len(record.outputs["adapter"]["sha256"]) == 64
    assert record.versions == {"pydantic": importlib.metadata.version("pydantic")}
    assert record.facts == {"loss": 1.5}
    assert record.options["quantization"] == ["Q4_K_M", "Q8_0"]
    assert record.started <= record.finished


def test_each_change_has_its_own_reason(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    stage.chosen = {"lora_rank": 9, "quantization": ["Q4_K_M", "Q8_0"]}
    assert why(stage, context) == ["lora-rank changed from 8 to 9"]
    stage.chosen["lora_rank"] = 8
    (tmp_path / "in").write_text("other")
    assert why(stage, context) == ["the input changed"]
    (tmp_path / "in").unlink()
    assert why(stage, context) == ["the input changed"]
    (tmp_path / "in").write_text("input")
    assert why(stage, context) == []
    (context.run.adapter / "more").write_text("")
    assert why(stage, context) == ["adapter is not the file that was made"]
    (context.run.adapter / "more").unlink()
    context.run.gguf.write_text("outpux")
    assert why(stage, context) == ["Merged.gguf is not the file that was made"]
    context.run.gguf.unlink()
    assert why(stage, context) == ["Merged.gguf is missing"]


def test_several_reasons_are_all_told(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    stage.chosen = {"lora_rank": 1, "quantization": ()}
    (tmp_path / "in").write_text("other")
    context.run.gguf.unlink()
    assert len(why(stage, context)) == 4


def test_an_input_that_is_added_or_taken_away_counts(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    (tmp_path / "more").write_text("more")
    both = {**stage.files, "more data": tmp_path / "more"}
    stage.files, alone = both, stage.files
    assert why(stage, context) == ["more data changed"]
    records.write(stage, context, Hasher(), {}, records.now())
    stage.files = alone
    assert why(stage, context) == ["more data is no longer given"]


def test_an_output_that_was_not_asked_for_before_counts(stage: FakeStage, context: Context) -> None:
    stage.made.append(context.run.quantized("Q8_0"))
    assert why(stage, context) == ["MergedQ8_0.gguf is missing"]
    context.run.quantized("Q8_0").write_text("from elsewhere")
    assert why(stage, context) == ["MergedQ8_0.gguf is not the file that was made"]


def test_another_version_counts_and_a_package_that_is_missing_is_told(stage: FakeStage, context: Context) -> None:
    record = context.run.record("fake")
    loaded = json.loads(record.read_text())
    loaded["versions"] = {"pydantic": "0.1"}
    del loaded["sha256"]  # of the record as it was
    record.write_text(json.dumps(loaded))
    assert why(stage, context)[0].startswith("pydantic changed from 0.1 to 2")
    stage.needs = ("no-such-package",)
    assert records.versions_of(stage) == {"no-such-package": "-"}


def test_times_play_no_part(stage: FakeStage, context: Context, tmp_path: Path) -> None:
    import os

    for path in (tmp_path / "in", context.run.gguf, context.run.adapter / "part", context.run.record("fake")):
        for when in (0, 2**31, 10**10):
            os.utime(path, (when, when))
            assert why(stage, context) == []


def test_a_record_cut_anywhere_is_no_record(stage: FakeStage, context: Context) -> None:
    path = context.run.record("fake")
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):  # the last byte is the newline
        path.write_bytes(whole[:cut])
        assert why(stage, context) == ["it has not run yet"]
    path.write_bytes(b"\0" * len(whole))
    assert why(stage, context) == ["it has not run yet"]


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(records.Record)])
@pytest.mark.parametrize("value", [None, [], "text", 5, {"x": None}])
def test_a_record_of_another_kind_never_raises(stage: FakeStage, context: Context, name: str, value: Any) -> None:
    path = context.run.record("fake")
    loaded = json.loads(path.read_text())
    loaded[name] = value
    del loaded["sha256"]  # of the record as it was
    path.write_text(json.dumps(loaded))
    found = why(stage, context)
    if name in ("options", "inputs", "versions", "outputs"):
        assert found


def test_a_record_that_was_changed_is_no_record(stage: FakeStage, context: Context) -> None:
    path = context.run.record("fake")
    loaded = json.loads(path.read_text())
    path.write_text(json.dumps(loaded | {"facts": {"final_loss": 0.1}}))
    assert records.read(context.run, "fake") is None
    assert why(stage, context) == ["it has not run yet"]
    path.write_text(json.dumps(loaded))
    assert why(stage, context) == []


@pytest.mark.parametrize("text", ["[]", "{}", "null", "5", '{"stage": "fake"}', '{"unknown": 1}'])
def test_json_that_is_no_record_is_no_record(stage: FakeStage, context: Context, text: str) -> None:
    context.run.record("fake").write_text(text)
    assert records.read(context.run, "fake") is None


def test_marks_come_and_go(context: Context) -> None:
    assert records.marked(context.run, "fake") == {}
    records.mark(context.run, "fake", "failed", "the cause")
    found = records.marked(context.run, "fake")
    assert (found["state"], found["cause"]) == ("failed", "the cause")
    records.unmark(context.run, "fake")
    records.unmark(context.run, "fake")
    assert records.marked(context.run, "fake") == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"state": 5}'])
def test_a_damaged_mark_is_survived(context: Context, text: str) -> None:
    records.mark(context.run, "fake", "running")
    (context.run.state / "fake.unfinished.json").write_text(text)
    assert isinstance(records.marked(context.run, "fake"), dict)


def test_the_time_is_utc_to_the_second() -> None:
    assert records.now().endswith("+00:00")
    assert len(records.now()) == 25
