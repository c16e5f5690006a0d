"""Runs on plain text: a base without a template is served as it was trained; chats then start from its adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.pipeline.run import run_pipeline
from kolotune.report.page import write as write_page
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record

from .conftest import chats

_OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 1e-2,
    "lora_rank": 4,
    "max_seq_length": 64,
    "dtype": "fp32",
    "compile": "off",
    "compare_answers": 1,
}


def without_template(base: Path, folder: Path) -> Path:
    """Return a copy of a base that has no chat template."""
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def run(tmp_path: Path, reporter: PlainReporter, name: str, **options: Any) -> RunFolder:
    run_pipeline(configs.resolve(({**_OPTIONS, "output_dir": tmp_path / name, **options}, "test", tmp_path)), reporter)
    return RunFolder(tmp_path / name)


def write_texts(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": " ".join(turn["content"] for turn in each) + "\n" * 2}) for each in chats(True)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "book.txt").write_text("The lamp of the tower is lit at dusk. " * 40, encoding="utf-8")
    return tmp_path / "texts.jsonl"


@pytest.mark.slow
def test_a_base_without_a_template_continues_texts_and_chats_follow(
    learned_bases: tuple[Path, Path],
    tmp_path: Path,
    reporter: PlainReporter,
    measured_here: None,
    one_thread: None,
) -> None:
    base, texts = without_template(learned_bases[0], tmp_path / "base"), write_texts(tmp_path)
    with pytest.raises(TemplateError, match="no chat template"):
        run(tmp_path, reporter, "chats", base_model=str(base), train_data=Path(__file__).with_name("none.jsonl"))
    common = {"base_model": str(base), "compare": True}
    text = run(tmp_path, reporter, "text", train_data=[texts, tmp_path / "book.txt"], objective="text", **common)
    comparison, record = Comparison.read(text.comparison), read_record(text, "prepare")
    assert comparison.passed and comparison.held_out and record is not None
    assert record.facts["cut_documents"] == 1
    assert comparison.recorded_tuned_loss == pytest.approx(comparison.tuned_loss, abs=1e-4)
    assert comparison.tuned_loss is not None and comparison.base_loss is not None
    assert comparison.tuned_loss < comparison.base_loss - 0.1
    asked = {check.name: check.prompt_ids_equal for check in comparison.checked if check.prompt_ids_equal is not None}
    assert all(count.good == count.of for count in asked.values())
    assert asked["f16 GGUF"].of > 0 and asked["served Q4_K_M"].of > 0
    assert comparison.answers[0].expected and comparison.answers[0].prompt in (tmp_path / "texts.jsonl").read_text()
    assert is_plain_text((text.tokenizer / "chat_template.jinja").read_text(encoding="utf-8"))
    template = parse_modelfile(text.modelfile("Q4_K_M").read_text(encoding="utf-8")).template
    assert template is not None and "<|im_start|>" not in template
    write_page(text)

    lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in chats(True))
    (tmp_path / "chats.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "own.jinja").write_text((learned_bases[0] / "chat_template.jinja").read_text(encoding="utf-8"))
    after = run(
        tmp_path, reporter, "after", train_data=tmp_path / "chats.jsonl", start_from=text.root,
        chat_template=tmp_path / "own.jinja", **common,
    )  # fmt: skip
    assert Comparison.read(after.comparison).passed


def test_a_base_with_a_template_keeps_it(
    learned_bases: tuple[Path, Path], tmp_path: Path, reporter: PlainReporter, measured_here: None, one_thread: None
) -> None:
    """The starter chats are its prompts."""
    trained = run(
        tmp_path, reporter, "text", train_data=write_texts(tmp_path), objective="text", eval_split=0.0,
        base_model=str(learned_bases[0]),
    )  # fmt: skip
    comparison = Comparison.read(trained.comparison)
    assert comparison.passed and not comparison.held_out
    assert comparison.answers and "puncture" in comparison.answers[0].prompt
    assert all(answer.expected is None for answer in comparison.answers), "the documents answer no question"
    assert "<|im_start|>" in (trained.tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
