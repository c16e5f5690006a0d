"""Names and words that go to schedulers, and what a run folder remembers of a job."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import TEXTS

from kolotune.foundation.errors import ConfigError, RunFolderError
from kolotune.launching.launcher import Launched, name_for, require_name, require_word
from kolotune.run_folder.layout import RunFolder


@given(st.text())
def test_each_folder_has_a_name_that_every_scheduler_takes(text: str) -> None:
    folder = Path("/runs") / text.replace("\0", "")
    assert require_name(name_for(folder)) == name_for(folder)


def test_two_folders_of_one_name_have_two(tmp_path: Path) -> None:
    assert name_for(tmp_path / "a" / "out") != name_for(tmp_path / "b" / "out")
    assert name_for(tmp_path / "out") == name_for(tmp_path / "a" / ".." / "out")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "1a", "a b", "a;b", "a\n", "a" * 51, "$(a)", "a.b", "../a"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be a job's name"):
        require_name(name)


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "a b", "a;b", "$(a)", "`a`", "a\nb", "a'b", 'a"b', "~a", "a|b"]
)
def test_what_is_no_word(text: str) -> None:
    with pytest.raises(ConfigError, match="characters"):
        require_word("qos", text)


def test_no_hostile_text_is_a_word_that_a_shell_reads() -> None:
    for text in TEXTS:
        try:
            word = require_word("qos", text)
        except ConfigError:
            continue
        assert not set(word) & set(" \t\n\r\"'`$;&|<>(){}!~#\\") and not word.startswith("-")


def test_a_folder_remembers_its_job(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="no job was launched"):
        Launched.read(folder)
    launched = Launched("ssh", {"hosts": ["a"]}, "name", 1, "/far/name", (("/far/name", str(tmp_path)),))
    launched.write(folder)
    assert Launched.read(folder) == launched
    folder.launched.write_text("[]")
    with pytest.raises(RunFolderError, match="no job was launched"):
        Launched.read(folder)
