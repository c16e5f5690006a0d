"""Disks without inodes, a temporary folder elsewhere, and outputs whose tails a power cut took."""

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
def made(room: Any, tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Path:
    """A finished run; read it only."""
    from kolotune.foundation import config as configs

    folder = tmp_path_factory.mktemp("made")
    options = {
        "train_data": room.root / "chats.jsonl", "base_model": str(room.root / "base"), "output_dir": folder / "run",
        "dtype": "fp32", "compile": "off", "epochs": 1, "lora_rank": 2, "checkpoint_steps": 0, "eval_split": 0,
        "template_date": "2026-01-02", "compare": False,
    }  # fmt: skip
    run_pipeline(configs.resolve((options, "test", folder)), reporter)
    return folder / "run"


def test_no_inodes_are_left(
    config_in: Callable[..., Config], mount: Callable[..., Path], reporter: PlainReporter, capsys: Any
) -> None:
    small = tmpfs(mount, "200m", "nr_inodes=14")
    config = config_in("unused", output_dir=small / "run")
    with pytest.raises(SpaceError, match="holds as many files as it can") as raised:
        run_pipeline(config, reporter)
    assert "Remove some files" in raised.value.hint
    run = RunFolder(small / "run")
    assert partials(run) == []
    subprocess.run(["mount", "-o", "remount,nr_inodes=4096", str(small)], check=True)
    run_pipeline(config, reporter, ["prepare"])
    assert states(run)["prepare"] == "done"


@pytest.mark.parametrize(("options", "words"), [("nr_inodes=1", "no inodes"), ("nr_inodes=99", "the disk is full")])
def test_what_a_library_in_rust_says_of_a_full_disk(options: str, words: str, mount: Callable[..., Path]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    small = tmpfs(mount, "64k", options)
    with pytest.raises(SpaceError, match=words), replacing(small / "weights") as partial:
        save_file({"x": np.zeros(100_000)}, partial)
    assert list(small.iterdir()) == []


def test_the_temporary_folder_is_on_another_file_system(
    made: Path, mount: Callable[..., Path], reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is renamed from there to here, which can't be done."""
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
    """The size is there and the last blocks are not, as after a power cut; the times say nothing."""
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
def test_a_lost_tail_is_seen_and_names_its_stage(
    name: str, damage: Callable[[Path], None], made: Path, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(made, tmp_path / "run")))
    damage(run.root / name)
    found = {each.name: each for each in read_status(run)}
    stage = found[_OUTPUTS[name]]
    assert stage.state is StageState.WILL_RUN
    assert ReasonKind.OUTPUT_ALTERED in {reason.kind for reason in stage.reasons}
    before = list(found)[: list(found).index(_OUTPUTS[name])]
    assert all(found[each].state is StageState.DONE for each in before)


def test_a_lost_tail_is_mended_by_that_stage_alone(
    made: Path, reporter: PlainReporter, capsys: Any, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(made, tmp_path / "run")))
    expected = results(run.root)
    for name in ("MergedQ4_K_M.gguf", "Merged.gguf", "merged_model/model.safetensors"):
        _zero(run.root / name)
        capsys.readouterr()
        run_pipeline(open_context(run).config, reporter)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("... ")]
        assert [line.split(":")[0] for line in said if "(" in line] == [f"... {_OUTPUTS[name]}"], said
        assert results(run.root) == expected


def test_a_record_that_lost_its_tail_is_no_record(made: Path, tmp_path: Path) -> None:
    for number, stage in enumerate(("prepare", "train", "merge", "convert", "quantize", "modelfile")):
        for damage in (_cut, _zero):
            run = RunFolder(Path(shutil.copytree(made, tmp_path / f"{number}{damage.__name__}")))
            damage(run.record(stage))
            assert states(run)[stage] == "will run"
