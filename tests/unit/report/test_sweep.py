"""The page about a sweep."""

from __future__ import annotations

from pathlib import Path

from kolotune.report import sweep

ROWS = [
    {"trial": 2, "scheduler_type": "<b>cosine", "loss": 1.25, "failure": ""},
    {"trial": 1, "scheduler_type": "linear", "loss": 1.5, "failure": ""},
    {"trial": 3, "scheduler_type": "constant", "loss": None, "failure": "the loss is <nan>"},
]
CURVES = {1: [(0, 3.0), (9, 1.5)], 2: [(0, 3.0), (9, 1.25)], 3: []}


def test_trials_and_their_losses(tmp_path: Path) -> None:
    text = sweep.write(tmp_path, "a model on chats & more", ["scheduler_type"], ROWS, CURVES).read_text()
    assert "a model on chats &amp; more" in text and "trial 2 is the best" in text
    assert "&lt;b&gt;cosine" in text and "the loss is &lt;nan&gt;" in text and "1.2500" in text
    assert text.count("<svg") == 2, "wide and narrow"
    assert "script" not in text and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_no_trial_was_trained(tmp_path: Path) -> None:
    text = sweep.write(tmp_path, "a model", ["scheduler_type"], ROWS[2:], CURVES).read_text()
    assert "<svg" not in text and "is the best" not in text
