"""Two hundred hostile texts in every text input: each is a name or a text, or refused; none runs or escapes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hostile import STEERING, TEXTS

from kolotune.base_models import hub
from kolotune.foundation import config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import JsonReporter, PlainReporter, RichReporter, print_pieces
from kolotune.ollama import model_name
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.runners.container import names as places
from kolotune.weights.adapter import read_adapter
from kolotune.weights.adapter_folder import is_adapter

Call = Callable[..., tuple[int, str]]


def test_there_are_two_hundred() -> None:
    assert len(TEXTS) == len(set(TEXTS)) >= 200


@pytest.fixture
def inner_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder below another one; the current one, and the home."""
    inner = tmp_path / "out" / "in"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(inner))
    return inner


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# What is looked at, and what is to be worked on: a run folder, data, a config, an adapter, a name in Ollama.
LINES: dict[str, tuple[Callable[[str], list[str]], tuple[int, ...]]] = {
    "status": (lambda text: ["status", "--", text], (12, 11)),
    "check": (lambda text: ["check", "--", text], (3, 11)),
    "config": (lambda text: ["run", "none.jsonl", f"--config={text}"], (2,)),
    "base model": (lambda text: ["run", "none.jsonl", f"--base-model={text}", "--output-dir=o"], (2, 3, 4, 5)),
    "quantization": (lambda text: ["run", "none.jsonl", f"--quantization={text}"], (2, 3)),
    "parameter": (lambda text: ["run", "none.jsonl", f"--parameter={text}"], (2, 3)),
    "date": (lambda text: ["run", "none.jsonl", f"--template-date={text}"], (2,)),
    "token": (lambda text: ["run", "none.jsonl", f"--hf-token={text}"], (2,)),
    "engine": (lambda text: ["run", "none.jsonl", f"--engine={text}"], (2,)),
    "option": (lambda text: ["run", "none.jsonl", f"--{text}"], (0, 2, 3)),
    "verb": (lambda text: [text], (0, 2)),
    "export": (lambda text: ["export", "--", text], (2, 4, 5, 11, 12)),
    "report": (lambda text: ["report", "--", text], (12, 11)),
    "repository": (lambda text: ["push", "none", f"--what=adapter", "--", text], (2, 12)),  # noqa: F541
}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("line", LINES)
def test_on_the_command_line(line: str, every: int, kolotune: Call, inner_folder: Path) -> None:
    argv, codes = LINES[line]
    for text in TEXTS[list(LINES).index(line) % every :: every]:
        code, output = kolotune(*argv(text))
        assert code in codes, (text, code, output)
        assert "Traceback" not in output, (text, output)
        assert not set(output) & STEERING, (text, output)
        # A run folder may have been begun; nothing else is there, and nothing outside.
        assert {each.split("/")[0] for each in everything_below(inner_folder)} <= {"o", "outputs"}, text
        assert [path.name for path in inner_folder.parent.parent.iterdir()] == ["out"], text
        assert [path.name for path in inner_folder.parent.iterdir()] == ["in"], text


def test_as_an_argument_of_a_program(tmp_path: Path) -> None:
    """All at once, as they are; those that no system takes are an error and start nothing."""
    sent = [text for text in TEXTS if "\0" not in text and "\ud800" not in text]
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    seen: list[str] = []
    assert (
        local.run([sys.executable, "-c", code, *sent], log=tmp_path / "log", on_line=lambda line: not seen.append(line))
        == 0
    )
    assert json.loads(seen[0]) == sent


def test_in_a_config_file(inner_folder: Path) -> None:
    """What a text becomes by way of the saved config is that text."""
    for text in TEXTS:
        try:
            original = config.resolve(
                ({"system": text, "compare_prompt": [text], "parameter": [f"stop={text}"]}, "", inner_folder)
            )
            Path("c.yaml").write_text(config.dump(original), encoding="utf-8", newline="")
        except (KolotuneError, UnicodeEncodeError):
            assert "\ud800" in text or "\udcff" in text
            continue
        again = config.resolve((config.load_file(Path("c.yaml")), "", inner_folder))
        assert again == original, text


@pytest.mark.parametrize("key", ["output_dir", "train_data", "base_model"])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have(key: str, name: str, inner_folder: Path) -> None:
    with pytest.raises(KolotuneError, match="a file name cannot contain") as error:
        config.resolve(({key: name}, "c.yaml", inner_folder))
    assert key.replace("_", "-") in error.value.cause


def test_in_a_modelfile() -> None:
    for text in TEXTS:
        for field in ({"system": text}, {"template": text}, {"license": text}, {"parameters": (("stop", text),)}):
            try:
                original = Modelfile("./Merged.gguf", **field)  # type: ignore[arg-type]
                text_form = render_modelfile(original)
            except KolotuneError as error:
                assert error.hint
                continue
            assert parse_modelfile(text_form) == original
        try:
            render_modelfile(Modelfile(f"./{text}"))
        except KolotuneError:
            continue
        assert ".." not in text.split("/") and "\n" not in text


def test_as_a_name_in_ollama() -> None:
    for text in TEXTS:
        try:
            model_name.check_name(text)
        except KolotuneError:
            continue
        assert re.fullmatch(r"[A-Za-z0-9_./:-]+", text) and ".." not in text.split("/") and text[0] not in "-./"


def test_as_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in TEXTS:
        for name in (text, f"owner/{text}", f"{text}/name"):
            if hub.is_hub_id(name):
                assert re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name) and ".." not in name


def test_as_an_adapter_and_as_its_tensors(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    for text in TEXTS:
        if "\ud800" in text or "\udcff" in text:
            continue
        file = tmp_path / "adapter_model.safetensors"
        file.unlink(missing_ok=True)
        save_file({text: np.ones((2, 2), np.float32)}, file)
        with pytest.raises(KolotuneError):
            read_adapter(tmp_path)
    for text in TEXTS:
        try:
            assert not is_adapter(tmp_path / "none" / text) or "\0" not in text
        except (OSError, ValueError):
            assert len(text) > 200 or "\0" in text or "\ud800" in text


def test_as_a_run_folder_in_the_container() -> None:
    for text in TEXTS:
        if "\ud800" in text:
            continue  # no name that comes from the system has it, and a config's is refused
        inside = places.run_folder(Path("/home/me") / text)
        assert inside.parent == places.run_folder(Path("/home/me/run")).parent
        assert re.fullmatch(r"[\w.-]+", inside.name, re.ASCII) and inside.name not in ("", ".", ".."), text


def test_in_everything_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for reporter in (PlainReporter(), RichReporter(), JsonReporter()):
        for text in TEXTS:
            if "\ud800" in text or "\udcff" in text:
                continue  # the command line sets its streams so that these are replaced
            for say in (reporter.doing, reporter.success, reporter.note, reporter.warning, reporter.result):
                say(text)
            reporter.failure(text, text)
            reporter.table(text, [text, "b"], [[text, text]])
            with reporter.progress(text) as count:
                count.update(1, 2, device=text)
        shown = capsys.readouterr()
        assert not set(shown.out + shown.err) & (STEERING - {"\r"}), type(reporter)


def test_in_what_a_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    print_pieces(TEXTS)
    assert not set(shown.getvalue()) & STEERING
    assert "👨‍👩‍👧" in shown.getvalue()


def test_run_folders_keep_their_names_inside(tmp_path: Path) -> None:
    """No quantization that passes makes the name of a file that lies elsewhere."""
    run = RunFolder(tmp_path)
    for text in TEXTS:
        try:
            original: Any = config.resolve(({"quantization": text}, "", tmp_path)).quantization
        except KolotuneError:
            continue
        assert all(run.quantized(name).parent == tmp_path for name in original)
