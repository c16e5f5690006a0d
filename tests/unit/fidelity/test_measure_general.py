"""What a model can do in general, measured before and after a change of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import tiny_llama

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.cli.comparison_table import show_general
from kolotune.fidelity import measure_general
from kolotune.fidelity.general_figures import GeneralFigures
from kolotune.fidelity.general_set import general_questions
from kolotune.fidelity.measure_general import GeneralMeasurement
from kolotune.fidelity.reference_model import WholeModel
from kolotune.fidelity.tasks import ModelsTask
from kolotune.fidelity.trained_format import TrainedFormat
from kolotune.foundation.reporter import PlainReporter


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))


def _task(base: Path, tokens: int, asks: bool) -> ModelsTask:
    limits = {"most_chats": 1, "most_tokens": 1, "most_answers": 1, "longest_answer": 1}
    return ModelsTask(
        str(base), "hash of the base", "", "", "", "", "", [], **limits, own_prompts=[], system="Be kind.", scratch="",
        learns_empty_thoughts=False, general_tokens=tokens, general_answers=asks,
    )  # fmt: skip


def _measure(base: Path, tuned: Path, tokens: int, asks: bool = False) -> GeneralFigures | None:
    measurement = GeneralMeasurement(_task(base, tokens, asks), TrainedFormat.load(base))
    measurement.measure_base(WholeModel(base))
    return measurement.measure_tuned(WholeModel(tuned))


@pytest.fixture
def tuned(tiny_base: Path, tmp_path: Path) -> Path:
    """A model of the same kind that says other things."""
    tiny_llama(seed=7, initializer_range=0.2).save_pretrained(tmp_path / "tuned")
    for name in TOKENIZER_FILES:
        if (tiny_base / name).is_file():
            (tmp_path / "tuned" / name).write_bytes((tiny_base / name).read_bytes())
    return tmp_path / "tuned"


def test_losses_and_answers(
    tiny_base: Path,
    tuned: Path,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = general_questions()[::10]
    monkeypatch.setattr(measure_general, "general_questions", lambda: some)
    general = _measure(tiny_base, tuned, 600, asks=True)
    assert general is not None and 590 < general.tokens < 603 and general.error is not None
    assert abs(general.tuned_loss - general.base_loss) > general.error > 0
    assert len(general.answers) == general.right()[2] == len(some)
    assert sum(general.right(kind)[2] for kind in general.kinds) == general.right()[2]
    assert any(answer.base != answer.tuned for answer in general.answers)
    show_general(general, reporter)
    assert "General questions answered rightly" in capsys.readouterr().out


def test_the_base_is_measured_once(tiny_base: Path, tuned: Path) -> None:
    first = _measure(tiny_base, tuned, 300)
    measurement = GeneralMeasurement(_task(tiny_base, 300, False), TrainedFormat.load(tiny_base))
    measurement.measure_base(WholeModel(tuned))  # not asked: the figures are known by the base's hash
    assert measurement.measure_tuned(WholeModel(tuned)) == first


def test_nothing_is_measured_where_nothing_is_asked_for(tiny_base: Path, tuned: Path) -> None:
    assert _measure(tiny_base, tuned, 0) is None
