"""Bad chats, bad options and bad models through the command line: a cause, a line, a code, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'


def turns(*pairs: tuple[Any, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}).encode() + b"\n"


CHATS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "chats.jsonl"),
    "blank lines only": (b"\n \n\n", "chats.jsonl"),
    "bad json": (GOOD + b'{"messages": [}\n' + GOOD, "chats.jsonl:2: not valid JSON at column 15"),
    "cut last line": (GOOD + GOOD[:40], "chats.jsonl:2: "),
    "words": (GOOD + b"hello\n", "chats.jsonl:2: not valid JSON"),
    "utf-16": (GOOD.decode().encode("utf-16"), "UTF-16"),
    "utf-32": (GOOD.decode().encode("utf-32"), "UTF-32"),
    "invalid utf-8": (GOOD + GOOD.replace(b"Hello", b"H\xffllo"), "chats.jsonl:2: "),
    "nul": (GOOD + GOOD.replace(b"Hello", b"H\\u0000llo"), "chats.jsonl:2: a NUL character"),
    "lone surrogate": (GOOD + GOOD.replace(b"Hello", b"H\\ud800llo"), "chats.jsonl:2: half a character"),
    "duplicate keys": (GOOD + b'{"messages": [], "messages": []}\n', "chats.jsonl:2: "),
    "nan": (GOOD + b'{"messages": [{"role": "user", "content": NaN}]}\n', "chats.jsonl:2: "),
    "a number": (GOOD + b"5\n", "chats.jsonl:2: "),
    "a list": (GOOD * 2 + b"[1, 2]\n", "chats.jsonl:3: "),
    "unknown keys": (GOOD + b'{"a": 1, "b": 2}\n', "chats.jsonl:2: "),
    "unknown role": (GOOD + turns(("user", "a"), ("wizard", "b")), 'chats.jsonl:2: turn 2: unknown role "wizard"'),
    "two users": (GOOD + turns(("user", "a"), ("user", "b"), ("assistant", "c")), "chats.jsonl:2: turn 2: a second"),
    "assistant first": (GOOD + turns(("assistant", "a"), ("user", "b"), ("assistant", "c")), "chats.jsonl:2: turn 1"),
    "system only": (GOOD + turns(("system", "a")), "chats.jsonl:2: no assistant turn"),
    "late system": (
        GOOD + turns(("user", "a"), ("system", "b"), ("assistant", "c")),
        "chats.jsonl:2: turn 2: a system",
    ),
    "no answer": (GOOD + turns(("user", "a"), ("assistant", "b"), ("user", "c")), "chats.jsonl:2: turn 3"),
    "empty answer": (
        GOOD + turns(("user", "a"), ("assistant", " \n")),
        "chats.jsonl:2: turn 2: the assistant's content",
    ),
    "content is a number": (GOOD + turns(("user", "a"), ("assistant", 5)), "chats.jsonl:2: "),
    "content is null": (GOOD + turns(("user", "a"), ("assistant", None)), "chats.jsonl:2: "),
    "no messages": (GOOD + b'{"messages": []}\n', "chats.jsonl:2: "),
    "deep": (GOOD + b"[" * 100_000 + b"]" * 100_000 + b"\n", "chats.jsonl:2: "),
    "terminal escapes": (GOOD + turns(("\x1b[2J\x1b]0;owned\x07\u202e", "a")), "chats.jsonl:2: "),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "chats.jsonl"),
}


@pytest.mark.parametrize("name", CHATS)
def test_bad_chats_are_reported_with_file_line_and_count(
    name: str, kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path
) -> None:
    data, words = CHATS[name]
    (tmp_path / "chats.jsonl").write_bytes(data)
    code, output = kolotune("check", tmp_path / "chats.jsonl", "--base-model", tiny_base)
    assert code == 3, output
    assert words in output
    assert "error: " in output
    assert "Traceback" not in output
    assert not set(output) & {"\x1b", "\x07", "\u202e", "\x00"}
    if GOOD in data:
        assert "error: 1 problem in the chats" in output


@pytest.mark.parametrize("name", ["bad json", "unknown role", "empty file"])
def test_a_run_with_bad_chats_stops_before_training_and_makes_nothing(
    name: str, kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path
) -> None:
    data, words = CHATS[name]
    (tmp_path / "chats.jsonl").write_bytes(data)
    code, output = kolotune("run", tmp_path / "chats.jsonl", "--base-model", tiny_base, "--output-dir", tmp_path / "o")
    assert code == 3
    assert words in output
    assert "Traceback" not in output
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) in ([".kolotune"], [".kolotune", "config.yaml"])
    assert not (tmp_path / "o" / ".kolotune" / "prepared").exists()
    assert not list((tmp_path / "o").rglob("*.partial"))


def test_bad_chats_can_be_left_out_and_are_listed(
    kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_bytes(GOOD + b"{\n" + turns(("user", "a")))
    flags = ["--base-model", tiny_base, "--output-dir", tmp_path / "o"]
    code, output = kolotune("prepare", tmp_path / "chats.jsonl", *flags, "--skip-bad")
    assert code == 0, output
    assert "2 bad chats were left out" in output
    assert "chats.jsonl:2: " in output
    assert "chats.jsonl:3: " in output
    record = json.loads((tmp_path / "o" / ".kolotune" / "prepare.json").read_text())
    assert (record["facts"]["chats"], len(record["facts"]["bad"])) == (1, 2)


OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "no data": ([], 2, "no training data was given"),
    "no such flag": (["c.jsonl", "--epoch-count", "3"], 2, "there is no option --epoch-count"),
    "flag without value": (["c.jsonl", "--epochs", "--seed"], 2, "epochs must be a valid integer"),
    "epochs of words": (["c.jsonl", "--epochs", "many"], 2, "epochs must be a valid integer"),
    "negative epochs": (["c.jsonl", "--epochs", "-1"], 2, "epochs must be greater than or equal to 0, not '-1'"),
    "rate of 5": (["c.jsonl", "--learning-rate", "5"], 2, "learning-rate must be less than or equal to 1"),
    "rate of nan": (["c.jsonl", "--learning-rate", "nan"], 2, "learning-rate must be"),
    "rank 0": (["c.jsonl", "--lora-rank", "0"], 2, "lora-rank must be"),
    "unknown dtype": (["c.jsonl", "--dtype", "int3"], 2, "'auto', 'bf16' or 'fp32'"),
    "unknown engine": (["c.jsonl", "--engine", "os.system"], 2, "engine must be 'native'"),
    "unknown quantization": (["c.jsonl", "--quantization", "Q4"], 2, "Q4_K_M"),
    "matrix": (["c.jsonl", "--quantization", "iq1_s", "--importance-matrix", "never"], 2, "IQ1_S needs an importance"),
    "none and more": (["c.jsonl", "--quantization", "none,Q8_0"], 2, "quantization: none"),
    "parameter": (["c.jsonl", "--parameter", "hot"], 2, "'hot' is not of the form name=value"),
    "unknown parameter": (["{good}", "--base-model", "{base}", "--parameter", "hot=1"], 2, "hot"),
    "no number": (["{good}", "--base-model", "{base}", "--parameter", "temperature=hot"], 2, "temperature"),
    "both evals": (["c.jsonl", "--eval-data", "e", "--eval-split", "0.1"], 2, "exclude each other"),
    "date": (["c.jsonl", "--template-date", "1.2.2026"], 2, "YYYY-MM-DD"),
    "token": (["c.jsonl", "--hf-token", "hf_SecretSecretSecret"], 2, "never the token itself"),
    "long token": (["c.jsonl", "--hf-token", "hf_Secret" * 60], 2, "never the token itself"),
    "no config": (["c.jsonl", "--config", "none.yaml"], 2, "none.yaml: can't be read"),
    "too long for the model": (["{good}", "--base-model", "{base}", "--max-seq-length", "4096"], 2, "at most 2048"),
    "no data file": (["none.jsonl", "--base-model", "{base}"], 3, "none.jsonl: no such file"),
    "a folder without chats": (["empty", "--base-model", "{base}"], 3, "is a folder"),
    "nothing fits": (["{good}", "--base-model", "{base}", "--max-seq-length", "8"], 3, "1 are too long"),
    "unknown model": (["{good}", "--base-model", "gpt-5"], 5, "base model 'gpt-5': no such folder"),
    "missing folder": (["{good}", "--base-model", "./none"], 5, "no such folder"),
    "a file as model": (["{good}", "--base-model", "{good}"], 4, "not a model folder"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_are_reported_before_any_work(
    name: str, kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    arguments, wanted, words = OPTIONS[name]
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = [each.format(good=tmp_path / "good.jsonl", base=tiny_base) for each in arguments]
    code, output = kolotune("run", *filled, "--output-dir", "o")
    assert code == wanted, output
    assert words in output
    assert "Traceback" not in output
    assert "Secret" not in output
    assert not list(tmp_path.rglob("*.partial"))
    assert [path.name for path in tmp_path.glob("o/*")] in ([], [".kolotune"], ["config.yaml", ".kolotune"]) or (
        sorted(path.name for path in tmp_path.glob("o/*")) == [".kolotune", "config.yaml"]
    )


YAML: dict[str, tuple[str | bytes, str]] = {
    "bad yaml": ("epochs: 1\nlora_rank: [\n", "options.yaml:3: not valid YAML"),
    "tab": ("epochs: 1\n\tseed: 1\n", "options.yaml:2: not valid YAML"),
    "list": ("- epochs\n", "name: value"),
    "python object": ("system: !!python/object/apply:os.system [touch made]\n", "options.yaml:1: not valid YAML"),
    "component": ("_component_: os.system\n", "unknown option '_component_'"),
    "misspelt": ("learning-rat: 1\n", "did you mean learning_rate?"),
    "wrong kinds": ("quantization: 5\nparameter: 5\ntrain_data: 5\n", "quantization must be a valid tuple, not 5"),
    "nul": ('base_model: "a\\0b"\n', "base-model: "),
    "infinite": ("lora_alpha: .inf\n", "lora-alpha must be a finite number"),
    "token": ("hf_token: hf_SecretSecret\n", "never the token itself"),
    "latin-1": (b"system: \xe9\n", "can't be read"),
    "negative": ("epochs: -3\n", "options.yaml: epochs must be"),
}


@pytest.mark.parametrize("name", YAML)
def test_bad_config_files_are_reported(
    name: str, kolotune: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: Any
) -> None:
    text, words = YAML[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    code, output = kolotune("run", "c.jsonl", "--config", "options.yaml")
    assert code == 2
    assert words in output
    assert "Traceback" not in output
    assert "Secret" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


def _change(name: str, **changes: Any) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return do


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5_000_000)


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')


def _template(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


MODELS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), 4, "no config.json"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{,"), 4, "config.json: can't be read"),
    "no architecture": (_change("config.json", architectures=[]), 4, "names no architecture"),
    "quantized": (_change("config.json", quantization_config={"bits": 4}), 4, "quantized already"),
    "pickled": (_pickled, 4, "only pickled ones"),
    "cut": (_cut, 4, "is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 4, "no safetensors weights"),
    "index outside": (_index, 4, "outside the folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 4, "has no tokenizer"),
    "damaged tokenizer": (lambda folder: os.truncate(folder / "tokenizer.json", 999), 4, "tokenizer can't be loaded"),
    "no template": (_no_template, 8, "no chat template"),
    "template with a fault": (_template("{% for %}"), 8, "template"),
    "template that reaches out": (_template("{{ ''.__class__.__mro__ }}"), 8, "template"),
    "empty template": (_template(""), 8, "template"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models_are_reported(
    name: str, kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path
) -> None:
    spoil, wanted, words = MODELS[name]
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    spoil(folder)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    arguments = ["prepare", tmp_path / "good.jsonl", "--base-model", folder, "--output-dir", tmp_path / "o"]
    code, output = kolotune(*arguments)
    assert code in (wanted, 3) if wanted == 8 else code == wanted, output
    assert words in output
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "o" / ".kolotune" / "prepared").exists()


HOSTILE = [
    "; rm -rf ~",
    "$(touch made)",
    "`touch made`",
    "new\nline",
    "quo'te\"",
    "é日本 🙂",
    "a b",
    "%s{x}",
    "a" * 300,
]


@pytest.mark.parametrize("name", [*HOSTILE, "-dash", "--help"])
def test_hostile_names_of_base_models_are_names(
    name: str, kolotune: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    code, output = kolotune("run", "good.jsonl", f"--base-model={name}", "--output-dir", "o")
    assert code == 5
    assert "no such folder" in output
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("made"))


@pytest.mark.parametrize("name", [*HOSTILE, "-dash", "bad\udcff"])
def test_hostile_names_of_data_and_folders_are_names(
    name: str, kolotune: Callable[..., tuple[int, str]], tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--base-model", tiny_base, f"--output-dir={name}.run"]
    if len(name) > 255:
        (tmp_path / "good.jsonl").write_bytes(GOOD)
        for arguments in (["check", name], ["run", "good.jsonl", *flags], ["status", name], ["export", name]):
            code, output = kolotune(*arguments)
            assert code in (3, 11, 12)
            assert "File name too long" in output
            assert "Traceback" not in output
        return
    (tmp_path / f"{name}.jsonl").write_bytes(GOOD)
    code, output = kolotune("prepare", *flags, "--", f"{name}.jsonl")
    assert code == 0, output
    assert "Traceback" not in output
    assert (tmp_path / f"{name}.run" / ".kolotune" / "prepared" / "train.safetensors").is_file()
    assert kolotune("prepare", *flags, "--", f"{name}.jsonl")[1].count("done before") == 1
    assert kolotune("status", "--", f"{name}.run")[0] == 0
    assert not list(tmp_path.rglob("made"))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_programs_own_words_reach_a_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kolotune", "run", "c.jsonl", "--epochs", "x", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    failure = json.loads(done.stdout.splitlines()[-1])
    assert failure["event"] == "failure"
    assert "epochs" in failure["cause"]
    assert failure["hint"]
    assert done.stderr == ""
