"""The verb, with its measuring in processes of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune import config as configs
from kolotune.config import Config
from kolotune.fidelity.result import Comparison
from kolotune.files import Hasher, size_of
from kolotune.layout import RunFolder


@pytest.mark.slow
def test_compare_shows_what_it_found_and_fails_with_its_own_code(
    learnt: Config, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(learnt.output_dir, run.root)
    run.config.write_text(configs.dump(dataclasses.replace(learnt, output_dir=run.root)), encoding="utf-8")
    code, output = kolotune("compare", run.root, "--compare-prompt", "Here is a red cup. Which colour?")
    assert code == 0, output
    assert "Compared on 6 held-out chats" in output and output.count(" ok\n") == 7 and "FAILED" not in output
    assert [each.prompt for each in Comparison.read(run.comparison).answers] == ["Here is a red cup. Which colour?"]
    code, again = kolotune("compare", run.root)
    assert code == 0 and "done before" in again and "Compared on 6 held-out chats" in again
    file = run.modelfile("Q4_K_M")
    file.write_text(file.read_text().replace('PARAMETER stop "<|im_end|>"\n', ""))
    record: dict[str, Any] = json.loads(run.record("modelfile").read_text())
    record["outputs"][file.name] = {"size": size_of(file), "sha256": Hasher().of(file)}
    del record["sha256"]  # of the record as it was
    run.record("modelfile").write_text(json.dumps(record))
    code, output = kolotune("compare", run.root)
    assert code == 28, output
    assert "error: modelfile: served Q4_K_M: no stop for '<|im_end|>'" in output
    assert "Likely cause: a PARAMETER stop is missing" in output and "served Q4_K_M" in output and "FAILED" in output
    code, output = kolotune("status", run.root)
    assert "compare" in output and "failed" in output
