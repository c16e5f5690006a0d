"""The names of jobs, the job that a run folder records, and its launcher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import TEXTS

from kolotune.foundation.errors import ConfigError, LaunchError, RunFolderError
from kolotune.launching.job_names import name_for, require_name, require_word
from kolotune.launching.kubernetes import Kubernetes
from kolotune.launching.launcher import LaunchedJob, Launcher
from kolotune.launching.registry import launched_job
from kolotune.launching.slurm import Slurm
from kolotune.launching.ssh import Ssh
from kolotune.run_folder.layout import RunFolder


@given(st.text())
def test_every_folder_gets_a_valid_name(text: str) -> None:
    folder = Path("/runs") / text.replace("\0", "")
    assert require_name(name_for(folder)) == name_for(folder)


def test_folders_of_the_same_name_get_different_names(tmp_path: Path) -> None:
    assert name_for(tmp_path / "a" / "out") != name_for(tmp_path / "b" / "out")
    assert name_for(tmp_path / "out") == name_for(tmp_path / "a" / ".." / "out")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "1a", "a b", "a;b", "a\n", "a" * 51, "$(a)", "a.b", "../a"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(ConfigError):
        require_name(name)


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "a b", "a;b", "$(a)", "`a`", "a\nb", "a'b", 'a"b', "~a", "a|b"]
)
def test_invalid_words(text: str) -> None:
    with pytest.raises(ConfigError):
        require_word("qos", text)


def test_no_hostile_text_is_a_valid_word() -> None:
    for text in TEXTS:
        try:
            word = require_word("qos", text)
        except ConfigError:
            continue
        assert not set(word) & set(" \t\n\r\"'`$;&|<>(){}!~#\\") and not word.startswith("-")


def test_a_run_folder_records_its_job(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError):
        LaunchedJob.read(folder)
    job = LaunchedJob("ssh", {"hosts": ["a"]}, "name", 1, "/far/name", (("/far/name", str(tmp_path)),))
    job.write(folder)
    assert LaunchedJob.read(folder) == job
    folder.launched.write_text("[]")
    with pytest.raises(RunFolderError):
        LaunchedJob.read(folder)


@pytest.mark.parametrize(
    "launcher",
    [
        Kubernetes("image", "claim", token_secret="hub/token"),
        Slurm("local"),
        Slurm(partition="gpu", more=("constraint=a100", "nice=5"), keeps_secrets=True),
        Ssh(("a", "me@b"), "/far", ssh_config="/config"),
    ],
    ids=lambda launcher: type(launcher).__name__,
)
def test_a_launcher_is_restored_from_the_run_folder(launcher: Launcher, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    options = dataclasses.asdict(launcher)  # type: ignore[call-overload]
    LaunchedJob(options.get("on", type(launcher).__name__.lower()), options, "1", 1, "/run").write(folder)
    restored, job = launched_job(folder)
    assert restored == launcher and dataclasses.asdict(restored) == options  # type: ignore[call-overload]
    assert job.options == json.loads(json.dumps(options))


@pytest.mark.parametrize("change", [{"on": "nowhere"}, {"options": {"hosts": 3}}, {"options": {}}])
def test_a_launcher_that_this_version_does_not_know_is_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    job = LaunchedJob("ssh", {"hosts": ["a"]}, "1", 1, "/run")
    dataclasses.replace(job, **change).write(folder)
    with pytest.raises(LaunchError):
        launched_job(folder)
