"""What a first run downloads and compiles while its base is looked up, and that later runs don't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline import first_start
from kolotune.run_folder.layout import RunFolder


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    engine = SimpleNamespace(has_compiled_step=True, can_compile=lambda dtype: done.append(f"compiled for {dtype}"))
    monkeypatch.setattr(first_start, "get_engine", lambda name: engine)
    monkeypatch.setattr(first_start.llamacpp, "ensure", lambda reporter: done.append("downloaded"))
    return done


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["train", "convert"], {}, ["compiled for fp32", "downloaded"]),
        (["train"], {}, ["compiled for fp32"]),
        (["train", "quantize"], {"compile": "on"}, ["downloaded"]),
        (["convert"], {}, []),
    ],
)
def test_what_is_needed_first(
    names: list[str],
    options: dict[str, Any],
    expected: list[str],
    done: list[str],
    reporter: PlainReporter,
    tmp_path: Path,
) -> None:
    config = configs.resolve(({"dtype": "fp32", "output_dir": tmp_path, **options}, "test", tmp_path))
    with first_start.fetched_meanwhile(config, RunFolder(tmp_path), names, reporter):
        pass
    assert sorted(done) == expected


def test_nothing_where_a_training_is_recorded(done: list[str], reporter: PlainReporter, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record("train").parent.mkdir(parents=True)
    run.record("train").write_text("{}")
    config = configs.resolve(({"dtype": "fp32", "output_dir": tmp_path}, "test", tmp_path))
    with first_start.fetched_meanwhile(config, run, ["train", "convert"], reporter):
        pass
    assert done == []
