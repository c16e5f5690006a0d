"""What the reading of chats found that the user should look at: misspelled keys, markers of empty cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.dataset.prepared import Prepared
from kolotune.foundation.errors import DataError
from kolotune.foundation.reporter import PlainReporter

Prepare = Callable[..., tuple[Prepared, Any]]
RECORDS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(20)]


@pytest.mark.parametrize("entry", ["question=Frage", "context=tabel"])
def test_a_key_of_a_part(entry: str, prepare_records: Prepare) -> None:
    with pytest.raises(DataError, match="no record has the key"):
        prepare_records(RECORDS, eval_split=0, map=entry)


def test_one_record_with_the_key_is_enough(prepare_records: Prepare) -> None:
    records = [*RECORDS, {"Frage": "q", "answer": "a", "note": "x"}]
    prepared, _ = prepare_records(records, eval_split=0, map="question=Frage", ignore_keys="note")
    assert (prepared.train.chats, prepared.absent_keys) == (21, ())


def test_a_key_to_be_ignored(prepare_records: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    from kolotune.stages.prepare import report_prepared

    prepared, _ = prepare_records(RECORDS, eval_split=0, ignore_keys="gewicht")
    report_prepared(prepared, PlainReporter())
    assert "no record has the key 'gewicht'" in " ".join("".join(capsys.readouterr()).split())


def test_markers_of_empty_cells(prepare_records: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    from kolotune.stages.prepare import report_prepared

    empty = [{"question": f"r{number}", "answer": "#N/A"} for number in range(3)]
    prepared, _ = prepare_records([*RECORDS, *empty], eval_split=0)
    report_prepared(prepared, PlainReporter())
    assert "3 answers are '#N/A'" in " ".join("".join(capsys.readouterr()).split())


TEMPLATE = """{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_keys_of_tools_that_are_not_handed_on(
    prepare_records: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kolotune.stages.prepare import report_prepared

    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string", "default": "y"}}}}
    template = tmp_path / "tools.jinja"
    template.write_text(TEMPLATE)
    records = [{**RECORDS[0], "tools": [tool]}]
    prepared, _ = prepare_records(records, eval_split=0, chat_template=str(template), eval_data=[])
    report_prepared(prepared, PlainReporter())
    assert "hands to a template (default);" in " ".join("".join(capsys.readouterr()).split())
