"""A comparison survives its file unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kolotune.fidelity.comparison import (
    ComparedAnswer,
    Comparison,
    Count,
    Failure,
    MatrixSurvival,
    PathCheck,
    QuantizationFigures,
    StageCheck,
)
from kolotune.foundation.errors import ArtifactError

WHOLE = Comparison(
    chats=2,
    positions=9,
    held_out=True,
    base_loss=3.5,
    tuned_loss=2.125,
    recorded_base_loss=None,
    recorded_tuned_loss=2.13,
    checked=(
        StageCheck(
            "merged", "merge", "merged_model", 12, "adapter on base", Count(3, 3), 1.0, 1e-7, 2e-6, 2.1, Count(2, 2)
        ),
        StageCheck("served f16", "modelfile", "Modelfile", bounds={"kl_mean": 0.1}, failed=("one", "two")),
    ),
    answers=(ComparedAnswer("Hi", None, "Hello", "Hello."),),
    not_kept=("f16 GGUF",),
    notes=("a note",),
    quantizations=(
        QuantizationFigures(
            "Q4_K_M",
            100,
            2.2,
            0.01,
            0.97,
            True,
            gain_kept=0.95,
            gain_kept_error=0.02,
            matrices=(MatrixSurvival("blk.0.attn_q.weight", "Q4_K", 0.5), MatrixSurvival("output.weight", "Q6_K", 1.0)),
        ),
    ),
    recommended="Q4_K_M",
    recommended_because="it is small",
    failure=Failure("modelfile", "what", "why"),
    paths=(
        PathCheck(
            "Q4_K_M",
            "jinja",
            True,
            Count(2, 3),
            {"question": "equal", "tools": "training-refuses", "call": "server-refuses", "turns": "different"},
        ),
    ),
)


def test_the_unquantized_gguf_is_named_by_its_type() -> None:
    named = WHOLE.with_type("f32")
    assert [check.name for check in named.checked] == ["merged", "served f32"]
    assert named.not_kept == ("f32 GGUF",) and [path.name for path in named.paths] == ["Q4_K_M"]
    assert named.with_type("f16") == named and WHOLE.with_type("f16") == WHOLE


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    WHOLE.write(tmp_path / "c.json")
    read = Comparison.read(tmp_path / "c.json")
    assert read == WHOLE
    assert [check.passed for check in read.checked] == [True, False] and not read.passed
    assert str(read.checked[0].prompt_ids_equal) == "3/3" and str(read.checked[1].stops) == "-"


def test_the_share_of_the_change_is_the_mean_over_the_matrices() -> None:
    assert WHOLE.quantizations[0].change_kept == 0.75
    assert dataclasses.replace(WHOLE.quantizations[0], matrices=()).change_kept is None


def test_traits_that_training_refuses_do_not_count() -> None:
    assert WHOLE.paths[0].traits_equal == Count(1, 3)


def test_comparisons_of_earlier_versions_name_no_paths_and_no_shares(tmp_path: Path) -> None:
    WHOLE.write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    del content["paths"], content["samples"]
    for figures in (*content["checked"], *content["quantizations"]):
        for name in ("gain_kept", "gain_kept_error", "matrices"):
            figures.pop(name, None)
    (tmp_path / "c.json").write_text(json.dumps(content))
    figures = dataclasses.replace(WHOLE.quantizations[0], gain_kept=None, gain_kept_error=None, matrices=())
    expected = dataclasses.replace(WHOLE, paths=(), quantizations=(figures,))
    assert Comparison.read(tmp_path / "c.json") == expected


def test_the_fields_of_the_file(tmp_path: Path) -> None:
    """The order and names of fields are the schema; `passed` is written, and ignored when read."""
    WHOLE.write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert list(content) == [
        "chats", "positions", "held_out", "base_loss", "tuned_loss", "recorded_base_loss", "recorded_tuned_loss",
        "checked", "answers", "not_kept", "notes", "quantizations", "recommended", "recommended_because", "failure",
        "paths", "version", "samples", "general", "passed",
    ]  # fmt: skip
    assert list(content["checked"][0]) == [
        "name", "stage", "file", "size_bytes", "against", "prompt_ids_equal", "top1_agreement", "kl_mean", "kl_p99",
        "loss", "stops", "bounds", "failed", "gain_kept", "gain_kept_error", "passed",
    ]  # fmt: skip
    assert content["passed"] is False and [check["passed"] for check in content["checked"]] == [True, False]
    (tmp_path / "c.json").write_text(json.dumps({**content, "passed": True}))
    assert Comparison.read(tmp_path / "c.json") == WHOLE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checked": []}', "null"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not a comparison"):
        Comparison.read(tmp_path / "c.json")


def test_other_versions_are_refused(tmp_path: Path) -> None:
    dataclasses.replace(WHOLE, version=0).write(tmp_path / "c.json")
    with pytest.raises(ArtifactError, match="another version"):
        Comparison.read(tmp_path / "c.json")
