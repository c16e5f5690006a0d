"""The pipeline on disks that are too small, full, or not to be written to."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.mounts import tmpfs
from support.runs import config_of, partials, states

from kolotune.foundation.errors import SpaceError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline import preflight
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder


def test_too_little_space_is_reported_before_any_work(
    run_copy: RunFolder, mount: Callable[..., Path], reporter: PlainReporter
) -> None:
    small = tmpfs(mount, "4m")
    with pytest.raises(SpaceError, match=r"needs about .* MB of disk space, but only .* are free") as error:
        run_pipeline(config_of(run_copy, output_dir=small / "run"), reporter)
    assert error.value.exit_code == 13
    assert not (small / "run" / ".kolotune" / "prepared").exists()


@pytest.mark.parametrize(
    ("stage", "free"),
    [
        ("prepare", 1_000_000),
        ("merge", 3_000_000),
        pytest.param("train", 24_000, marks=pytest.mark.slow),
        pytest.param("convert", 3_000_000, marks=pytest.mark.slow),
        pytest.param("quantize", 3_000_000, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_is_a_space_error_and_leaves_nothing_half_made(
    run_copy: RunFolder, mount: Callable[..., Path], reporter: PlainReporter, monkeypatch: Any, stage: str, free: int
) -> None:
    """The estimate is skipped, as if another program had filled the disk in the meantime."""
    small = RunFolder(tmpfs(mount, "60m") / "run")
    before = ["prepare", "train", "merge", "convert", "quantize"]
    results = {"train": "adapter", "merge": "merged_model", "convert": "Merged.gguf"}
    names = [".kolotune", "config.yaml", *(results[each] for each in before[: before.index(stage)] if each in results)]
    if stage != "prepare":
        small.root.mkdir()
        for name in names:
            source = run_copy.root / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, small.root / name)
        small.record(stage).unlink()
    ballast = small.root.parent / "ballast"
    ballast.write_bytes(b"x" * (shutil.disk_usage(small.root.parent).free - free))
    monkeypatch.setattr(preflight, "check_capacity", lambda *_: None)
    with pytest.raises(SpaceError, match="disk is full") as error:
        run_pipeline(config_of(run_copy, output_dir=small.root), reporter, [stage])
    assert error.value.exit_code == 13
    assert partials(small) == []
    ballast.unlink()
    if stage != "prepare":  # the first stage fails in a folder that has no saved config's record yet
        assert states(small)[stage] in ("failed", "interrupted")  # where even this mark did not fit


def test_a_read_only_folder_is_reported(run_copy: RunFolder, mount: Callable[..., Path], kolotune: Any) -> None:
    mounted = mount("--bind", str(run_copy.root))
    done = subprocess.run(["mount", "-o", "remount,bind,ro", str(mounted)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting read-only is not allowed here")
    code, output = kolotune("run", "--config", run_copy.config, "--output-dir", mounted, "--system", "x")
    assert code == 11
    assert "Read-only file system" in output
    assert "--output-dir" in output
    assert "Traceback" not in output
    assert kolotune("status", mounted)[0] == 0


def test_an_output_folder_that_is_a_file_is_reported(run_copy: RunFolder, kolotune: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, output = kolotune("run", "--config", run_copy.config, "--output-dir", tmp_path / "file")
    assert code == 11
    assert "can't be read or written" in output
    assert (tmp_path / "file").read_text() == "mine"
