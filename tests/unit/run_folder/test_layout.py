"""The names in a run folder are a promise to users."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation.errors import RunFolderError
from kolotune.run_folder.layout import RunFolder


def test_results_are_at_the_root_under_names_that_users_know() -> None:
    run = RunFolder(Path("/runs/one"))
    paths = [run.adapter, run.merged_model, run.gguf, run.quantized("Q4_K_M"), run.modelfile(), run.modelfile("Q8_0")]
    assert [path.relative_to(run.root).as_posix() for path in paths] == [
        "adapter",
        "merged_model",
        "Merged.gguf",
        "MergedQ4_K_M.gguf",
        "Modelfile",
        "ModelfileQ8_0",
    ]


def test_everything_else_is_below_the_state() -> None:
    run = RunFolder(Path("/runs/one"))
    results = {run.adapter, run.merged_model, run.gguf, run.report}
    kept = results | {run.config, run.metrics, run.manifest, run.root, run.state}
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    for name in names:
        path = getattr(run, name)
        assert path in kept or run.state in path.parents, name
    assert run.record("train") == run.state / "train.json"
    assert run.log("train") == run.state / "logs" / "train.log"
    assert len({getattr(run, name) for name in names}) == len(names)


def test_names_in_records_are_relative_with_forward_slashes() -> None:
    run = RunFolder(Path("/runs/one"))
    assert run.relative(run.prepared) == ".kolotune/prepared"
    with pytest.raises(ValueError, match="subpath"):
        run.relative(Path("/runs/two/x"))


def test_a_folder_without_a_saved_config_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunFolderError, match="not a run folder") as error:
            RunFolder(folder).require()
        assert error.value.exit_code == 12
        assert "kolotune run" in error.value.hint
    (tmp_path / "config.yaml").write_text("")
    assert RunFolder(tmp_path).require().root == tmp_path
