"""Disks without inodes, a temporary folder on another disk, and outputs that lost their tails in a power cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.mounts import tmpfs
from support.runs import partials, results, states

from kolotune.foundation.config import Config
from kolotune.foundation.errors import SpaceError
from kolotune.foundation.files import replacing
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.context import open_context
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import StageState, read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.reasons import ReasonKind


@pytest.fixture(scope="module")
def made(workspace: Any, tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Path:
    """A finished run. Do not change it."""
    from kolotune.foundation import config as configs

    folder = tmp_path_factory.mktemp("made")
    options = {
        "train_data": workspace.root / "chats.jsonl", "base_model": str(workspace.root / "base"),
        "output_dir": folder / "run", "dtype": "fp32", "compile": "off", "epochs": 1, "lora_rank": 2,
        "checkpoint_steps": 0, "eval_split": 0,
        "template_date": "2026-01-02", "compare": False,
    }  # fmt: skip
    run_pipeline(configs.resolve((options, "test", folder)), reporter)
    return folder / "run"


def test_no_inodes_are_free(
    config_in: Callable[..., Config], mount: Callable[..., Path], reporter: PlainReporter, capsys: Any
) -> None:
    small = tmpfs(mount, "200m", "nr_inodes=14")
    config = config_in("unused", output_dir=small / "run")
    with pytest.raises(SpaceError, match="no inodes") as raised:
        run_pipeline(config, reporter)
    assert "Remove some files" in raised.value.hint
    run = RunFolder(small / "run")
    assert partials(run) == []
    subprocess.run(["mount", "-o", "remount,nr_inodes=4096", str(small)], check=True)
    run_pipeline(config, reporter, ["prepare"])
    assert states(run)["prepare"] == "done"


@pytest.mark.parametrize(("options", "message"), [("nr_inodes=1", "no inodes"), ("nr_inodes=99", "the disk is full")])
def test_a_full_disk_under_a_library_in_rust(options: str, message: str, mount: Callable[..., Path]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    small = tmpfs(mount, "64k", options)
    with pytest.raises(SpaceError, match=message), replacing(small / "weights") as partial:
        save_file({"x": np.zeros(100_000)}, partial)
    assert list(small.iterdir()) == []


def test_the_temporary_folder_is_on_another_file_system(
    made: Path, mount: Callable[..., Path], reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No file is renamed from one file system to the other, which is not possible."""
    elsewhere = tmpfs(mount, "200m")
    assert os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr(tempfile, "tempdir", None)
    run = RunFolder(Path(shutil.copytree(made, tmp_path / "run")))
    expected = results(run.root)
    for stage in ("prepare", "merge", "convert", "quantize", "modelfile"):
        run.record(stage).unlink()
    shutil.rmtree(run.merged_model)
    run.gguf.unlink()
    run_pipeline(open_context(run).config, reporter)
    assert results(run.root) == expected
    assert list(elsewhere.iterdir()) == []


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 9 // 10)


def _zero(path: Path) -> None:
    """Keep the size and times, but zero the last blocks, as after a power cut."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-min(4096, status.st_size // 2), os.SEEK_END)
        file.write(bytes(status.st_size - file.tell()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


_OUTPUTS = {
    ".kolotune/prepared/train.safetensors": "prepare", ".kolotune/prepared/tokenizer/tokenizer.json": "prepare",
    "adapter/adapter_model.safetensors": "train", "adapter/adapter_config.json": "train",
    "merged_model/model.safetensors": "merge", "merged_model/config.json": "merge", "Merged.gguf": "convert",
    "MergedQ4_K_M.gguf": "quantize", "Modelfile": "modelfile", "ModelfileQ4_K_M": "modelfile",
}  # fmt: skip


@pytest.mark.parametrize("damage", [_cut, _zero])
@pytest.mark.parametrize("name", _OUTPUTS)
def test_a_lost_tail_is_detected_at_its_stage(
    name: str, damage: Callable[[Path], None], made: Path, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(made, tmp_path / "run")))
    damage(run.root / name)
    stages = {stage.name: stage for stage in read_status(run)}
    stage = stages[_OUTPUTS[name]]
    assert stage.state is StageState.WILL_RUN
    assert ReasonKind.OUTPUT_ALTERED in {reason.kind for reason in stage.reasons}
    before = list(stages)[: list(stages).index(_OUTPUTS[name])]
    assert all(stages[earlier].state is StageState.DONE for earlier in before)


def test_only_the_damaged_stage_runs_again(made: Path, reporter: PlainReporter, capsys: Any, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(made, tmp_path / "run")))
    expected = results(run.root)
    for name in ("MergedQ4_K_M.gguf", "Merged.gguf", "merged_model/model.safetensors"):
        _zero(run.root / name)
        capsys.readouterr()
        run_pipeline(open_context(run).config, reporter)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("... ")]
        assert [line.split(":")[0] for line in lines if "(" in line] == [f"... {_OUTPUTS[name]}"], lines
        assert results(run.root) == expected


def test_a_damaged_record_counts_as_none(made: Path, tmp_path: Path) -> None:
    for number, stage in enumerate(("prepare", "train", "merge", "convert", "quantize", "modelfile")):
        for damage in (_cut, _zero):
            run = RunFolder(Path(shutil.copytree(made, tmp_path / f"{number}{damage.__name__}")))
            damage(run.record(stage))
            assert states(run)[stage] == "will run"
