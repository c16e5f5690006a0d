"""Listing runs: which there are below a folder, and how far each came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kolotune.pipeline.lock import locked
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import MarkState, write_mark
from kolotune.runs.list import runs_below


def test_runs_are_listed_with_their_state(run_copy: RunFolder, tmp_path: Path, kolotune: Any) -> None:
    begun = tmp_path / "some" / "where" / "begun"
    (begun / ".kolotune").mkdir(parents=True)
    write_mark(RunFolder(begun), "train", MarkState.FAILED, "no memory")
    broken = tmp_path / "broken"
    (broken / ".kolotune").mkdir(parents=True)
    (broken / "config.yaml").write_text("a: [")
    deep = tmp_path / "1/2/3/4/5/6/7/deep/.kolotune"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(begun.parent)
    found = {each.folder.root.relative_to(tmp_path).as_posix(): each for each in runs_below(tmp_path)}
    assert {name: each.state_text for name, each in found.items()} == {
        "run": "done",
        "some/where/begun": "failed: train",
        "broken": "not begun",
    }
    own = found["run"]
    assert own.base == "tiny" and own.size > 1_000_000 and own.age < 3600
    write_mark(run_copy, "train", MarkState.RUNNING)
    assert next(each.state_text for each in runs_below(run_copy.root)) == "interrupted: train"
    with locked(run_copy):
        assert next(each.state_text for each in runs_below(run_copy.root)) == "running: train"
    code, output = kolotune("runs", tmp_path)
    assert code == 0 and "failed: train" in output
    assert kolotune("runs", tmp_path / "link2")[0] == 12
