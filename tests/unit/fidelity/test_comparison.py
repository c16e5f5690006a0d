"""A comparison goes through its file unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.fidelity.comparison import ComparedAnswer, Comparison, Count, Failure, QuantizationFigures, StageCheck
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.files import write_json

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
    quantizations=(QuantizationFigures("Q4_K_M", 100, 2.2, 0.01, 0.97, True),),
    recommended="Q4_K_M",
    recommended_because="it is small",
    failure=Failure("modelfile", "what", "why"),
)


def test_a_comparison_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", WHOLE.as_json())
    read = Comparison.read(tmp_path / "c.json")
    assert read == WHOLE
    assert [each.passed for each in read.checked] == [True, False] and not read.passed
    assert str(read.checked[0].prompt_ids_equal) == "3/3" and str(read.checked[1].stops) == "-"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checked": []}', "null"])
def test_what_is_no_comparison_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ArtifactError, match="is no comparison"):
        Comparison.read(tmp_path / "c.json")


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", {**WHOLE.as_json(), "version": 0})
    with pytest.raises(ArtifactError, match="another version"):
        Comparison.read(tmp_path / "c.json")
