"""The verb `serve`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from kolotune.cli.serve import serve
from kolotune.foundation import shared_libraries


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kolotune.serving.served_model.ServedModel", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("kolotune.serving.app.serve", lambda *_: None)
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)


@pytest.mark.parametrize("faster", ["", "it uses AVX2 alone"])
def test_a_llama_cpp_that_would_be_faster_is_named(
    faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_libraries, "faster_one", lambda: faster)
    assert serve([tmp_path]) == 0
    assert ("llama.cpp: it uses AVX2 alone" in capsys.readouterr().out) == bool(faster)


def test_a_users_own_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_libraries, "faster_one", lambda: "it uses AVX2 alone")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    for name, is_named in {"libllama.so": False, "llama-server": True}.items():
        (tmp_path / name).write_text("", encoding="utf-8")
        assert serve([tmp_path]) == 0
        shown = "".join(capsys.readouterr().out.split())
        assert ("llama-serveranswers" in shown) == is_named and ("AVX2alone" in shown) != is_named
