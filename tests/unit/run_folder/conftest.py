"""A run folder with one stage that has run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_stage import FakeStage

from kolotune.foundation.config import Config
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import now, write_record
from kolotune.run_folder.stage import Context


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
    write_record(fake, context, {"loss": 1.5}, now())
    return fake
