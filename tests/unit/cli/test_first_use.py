"""A newcomer's mistakes: what is said must lead on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("rum", 2, "Did you mean run?"),
        ("chats.jsonl", 2, "Did you mean: kolotune run chats.jsonl"),
        ("run --lr 1", 2, "Did you mean --learning-rate"),
        ("run --model x", 2, "Did you mean --base-model?"),
        ("run --epoch 3", 2, "Did you mean --epochs?"),
        ("models --josn", 2, "kolotune models: there is no option --josn"),
        ("container strat", 2, "kolotune container: there is no verb 'strat'"),
        ("--hlep", 2, "Did you mean --help?"),
        ("export", 2, "missing argument 'folder'"),
        ("run --epochs", 2, "'--epochs' requires an argument"),
        ("run", 2, "`kolotune init FOLDER` writes some to begin with"),
        ("prepare", 2, "kolotune prepare chats.jsonl"),
        ("check", 2, "kolotune check chats.jsonl"),
        ("run none.jsonl", 3, "none.jsonl: no such file"),
        ("check none.jsonl --base-model ./none", 3, "none.jsonl: no such file"),
        ("status", 12, "not a run folder (it does not exist)"),
        ("chat", 12, "`kolotune runs`"),
        ("runs", 0, "No runs in"),
    ],
)
def test_a_wrong_line_in_an_empty_folder(line: str, code: int, words: str, empty: Path, kolotune: Call) -> None:
    found, output = kolotune(*line.split())
    assert found == code and words in output, output
    assert "Traceback" not in output
    assert not list(empty.iterdir())


def test_what_is_here_is_named(empty: Path, kolotune: Call) -> None:
    (empty / "chats.jsonl").write_text("")
    assert "Here are chats: kolotune run chats.jsonl" in kolotune("run")[1]
    assert f"Did you mean {empty / 'chats.jsonl'}?" in kolotune("run", "chat.jsonl")[1]
    (empty / "chats.jsonl").unlink()
    code, output = kolotune("init")
    assert code == 0 and "kolotune check chats.jsonl" in output
    assert "kolotune run --config kolotune.yaml" in output
    assert "Here is a config: kolotune run --config kolotune.yaml" in kolotune("run")[1]


def test_no_good_chat_at_all(empty: Path, kolotune: Call) -> None:
    (empty / "notes.json").write_text('[{"title": "x"}]')
    code, output = kolotune("check", "notes.json")
    assert code == 3 and "`kolotune init FOLDER`" in output


def test_init_then_check(kolotune: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = kolotune("init")
    assert code == 0
    assert "kolotune run --config kolotune.yaml" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "kolotune.yaml"]
    for arguments in (["chats.jsonl"], ["--config", "kolotune.yaml"]):
        code, output = kolotune("check", *arguments)
        assert code == 0, output
        assert "No problems found in" in output
        assert "chats to train on" in output
    before = (tmp_path / "chats.jsonl").read_bytes()
    code, output = kolotune("init")
    assert code == 2 and "chats.jsonl: already exists" in output
    assert (tmp_path / "chats.jsonl").read_bytes() == before


def test_init_into_a_new_folder_and_never_half(kolotune: Call, tmp_path: Path) -> None:
    assert kolotune("init", tmp_path / "deep" / "new")[0] == 0
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "kolotune.yaml").write_text("mine")
    assert kolotune("init", tmp_path / "half")[0] == 2
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["kolotune.yaml"]
