"""What is shown of the settings before a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kolotune.cli.settings import show_settings
from kolotune.foundation.config import OPTIONS, Config
from kolotune.foundation.reporter import PlainReporter


class Tables(PlainReporter):
    """Keeps the rows of tables."""

    def table(self, title, columns, rows) -> None:  # type: ignore[no-untyped-def]
        self.rows = {option: value for _, option, value in rows}


def shown(config: Config, given: tuple[str, ...] = (), *, verbose: bool = False) -> dict[str, str]:
    say = Tables()
    show_settings(config, say, given, verbose=verbose)
    return say.rows


def test_what_was_given_or_chosen_is_shown() -> None:
    config = Config(train_data=(Path("chats.jsonl"),), learning_rate=1e-3, dtype="bf16")
    assert shown(config, ("epochs",)) == {
        "train-data": "chats.jsonl", "base-model": "smollm2-135m", "output-dir": "outputs",
        "learning-rate": "0.001", "dtype": "bf16", "epochs": "3",
    }  # fmt: skip


def test_everything_is_shown_when_asked_for() -> None:
    assert set(shown(Config(), verbose=True)) == {name.replace("_", "-") for name in OPTIONS}


def test_where_a_token_is_read_from_is_all_that_is_shown_of_it() -> None:
    for source in ("-", "/home/me/token"):
        value = shown(dataclasses.replace(Config(), hf_token=source))["hf-token"]
        assert source not in value and "*" in value
