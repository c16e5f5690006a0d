"""Paths inside the container and on the host."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest
import yaml

from kolotune.foundation.secrets import Secret
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container import names
from kolotune.runners.container.path_map import PathMap, map_texts


def test_the_longest_path_wins_and_a_secret_is_masked() -> None:
    paths = PathMap(Secret("hf_secret"))
    paths.add(PurePosixPath("/runs/a"), Path("/home/me/a"))
    paths.add(PurePosixPath("/runs/a-b"), Path("/home/me/other"))
    assert paths.to_host("/runs/a-b/x and /runs/a/y: hf_secret") == "/home/me/other/x and /home/me/a/y: ********"


def test_without_a_secret_nothing_is_masked() -> None:
    assert PathMap().to_host("unchanged") == "unchanged"


def test_every_text_of_an_event_is_translated() -> None:
    event = {"event": "table", "rows": [{"what": "/x", "n": 3}], "none": None}
    assert map_texts(event, lambda text: text.replace("/x", "/y")) == {
        "event": "table", "rows": [{"what": "/y", "n": 3}], "none": None,
    }  # fmt: skip


@pytest.mark.parametrize("strange", ['/home/it\'s: "me"/#1', "C:\\Users\\me\\new", "/home/日本\n/x"])
def test_files_of_a_run_that_contain_paths(strange: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state.mkdir()
    paths = PathMap()
    paths._pairs.append(("/runs/r-1", strange))
    run.config.write_text("output_dir: /runs/r-1\ntrain_data: [/runs/r-1/c.jsonl]\nepochs: 3\n")
    run.source.write_text(json.dumps({"source": "/runs/r-1/adapter"}))
    for file in (run.config, run.source):
        paths.rewrite(file, file, run)
    loaded = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    assert loaded == {"output_dir": strange, "train_data": [f"{strange}/c.jsonl"], "epochs": 3}
    assert json.loads(run.source.read_text())["source"] == f"{strange}/adapter"


def test_other_files_are_left_unchanged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    paths = PathMap()
    paths.add(PurePosixPath("/runs/r"), Path("/home"))
    run.modelfile().write_bytes(b"FROM /runs/r\r\n")
    paths.rewrite(run.modelfile(), run.modelfile(), run)
    assert run.modelfile().read_bytes() == b"FROM /runs/r\r\n"


def test_each_run_folder_has_a_folder_of_its_own(tmp_path: Path) -> None:
    first = names.run_folder(tmp_path / "outputs")
    assert first == names.run_folder(tmp_path / "x" / ".." / "outputs")
    assert first.parent == names.VOLUME and first.name.startswith("outputs-")
    assert first != names.run_folder(tmp_path / "other" / "outputs")


@pytest.mark.parametrize("name", ["; rm -rf ~", "$(id)", "a\nb", "-x", "..", "日本", "n" * 200, ".inputs", " "])
def test_the_name_of_that_folder_is_harmless(name: str, tmp_path: Path) -> None:
    folder = names.run_folder(tmp_path / "deep" / name)
    assert folder.parent == names.VOLUME
    assert len(folder.name) <= 51 and folder.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    assert not folder.name.startswith((".", "-"))
