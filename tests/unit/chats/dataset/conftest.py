"""Records prepared with SmolLM2's real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.base_models import packaged_model
from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.dataset.prepared import Prepared
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter


@pytest.fixture
def prepare_records(reporter: PlainReporter, tmp_path: Path) -> Callable[..., tuple[Prepared, Path]]:
    """Prepare records, and held-out ones if there are any; return what was found out, and the folder."""

    def call(records: list[Any], held_out: list[Any] = [], **options: Any) -> tuple[Prepared, Path]:  # noqa: B006
        folder = tmp_path / f"prepared {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        values = {"train_data": [write(tmp_path / "chats.jsonl", records)], **options}
        if held_out:
            values["eval_data"] = [write(tmp_path / "held_out.jsonl", held_out)]
        config = configs.resolve((values, "test", tmp_path))
        return prepare_chats(config, packaged_model.unpack(reporter), folder, processes=1), folder

    return call


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
