"""The command line as a user types it: help, verbs, exit codes, and where a token does not show up."""

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
from support.runs import STAGES_WITHOUT_COMPARE

from kolotune.fidelity.comparison import Comparison
from kolotune.foundation.config import Config
from kolotune.run_folder.layout import RunFolder

Call = Callable[..., tuple[int, str]]
PROGRAM = [sys.executable, "-m", "kolotune"]
VERBS = [
    "run",
    "sweep",
    "prepare",
    "train",
    "merge",
    "convert",
    "quantize",
    "modelfile",
    "check",
    "status",
    "runs",
    "clean",
    "chat",
    "install",
    "uninstall",
    "serve",
    "export",
    "init",
    "models",
    "doctor",
    "version",
]
FLAGS = [
    "--epochs",
    "--learning-rate",
    "--train-data",
    "--base-model",
    "--lora-rank",
    "--lora-alpha",
    "--lora-dropout",
    "--max-seq-length",
    "--warmup-steps",
    "--seed",
    "--scheduler-type",
    "--batch-size",
    "--output-dir",
    "--quantization",
    "--weight-decay",
    "--use-checkpoint",
    "--hf-token",
    "--engine",
    "--dtype",
    "--merge-dtype",
    "--eval-split",
    "--eval-data",
    "--skip-bad",
    "--no-compare",
    "--config",
]
TOKEN = "hf_PlantedTokenThatMustNotBeSeen"


def real(*arguments: Any, cwd: Path, typed: str = "", **env: str) -> tuple[int, str]:
    """Calls kolotune as a process of its own."""
    argv = [*PROGRAM, *map(str, arguments)]
    whole = {**os.environ, **env}
    done = subprocess.run(argv, cwd=cwd, env=whole, input=typed, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_help_names_every_verb(kolotune: Call) -> None:
    for flag in ("--help", "-h"):
        code, output = kolotune(flag)
        assert code == 0
        for verb in VERBS:
            assert f"\n  {verb} " in output


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(kolotune: Call, verb: str) -> None:
    code, output = kolotune(verb, "--help")
    assert code == 0
    assert f"Usage: kolotune {verb}" in output
    assert kolotune(verb, "-h") == (code, output)


def test_run_has_the_flags_of_the_script_that_it_replaces(kolotune: Call) -> None:
    words = kolotune("run", "--help")[1].replace(",", " ").split()
    assert [flag for flag in FLAGS if flag not in words] == []


def test_help_shows_the_defaults(kolotune: Call) -> None:
    text = " ".join(kolotune("run", "--help")[1].split())
    for default in ("3", "0.0002", "Q4_K_M", "outputs", "smollm2-135m", "cosine"):
        assert f"[default: {default}]" in text
    assert "[default: 32.0] [with torchtune: 16.0]" in text and "[with torchtune: 100]" in text


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["chat", "-h"], ["nonsense"], []])
def test_help_loads_nothing_large(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from kolotune.cli import run_command_line; run_command_line(sys.argv[1:]);"
        # not pydantic: typer itself takes it for the verbs' help since 0.29
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich', 'yaml', 'xllamacpp', 'psutil'};"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage: kolotune"),
        (["nonsense"], "there is no verb 'nonsense'"),
        (["run", "--nonsense"], "there is no option --nonsense"),
        (["run", "--epochs"], "requires an argument"),
        (["status", "a", "b"], "unexpected extra argument"),
        (["export"], "missing argument"),
        (["chat", "--temperature", "hot"], "invalid value for '--temperature'"),
        (["chat", "--max-tokens", "0"], "invalid value for '--max-tokens'"),
    ],
)
def test_a_wrong_command_line_is_2_with_words_and_without_a_traceback(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    code, output = real(*arguments, cwd=tmp_path)
    assert code == 2
    assert words in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_check_shows_what_is_trained_on(kolotune: Call, write_chats: Any, tiny_base: Path) -> None:
    code, output = kolotune("check", write_chats(3), "--base-model", tiny_base)
    assert code == 0
    assert "3 chats to train on, 0 held out" in output
    assert "<|im_start|>user\nWhat is 0 plus 1?<|im_end|>\n<|im_start|>assistant\n⟦It is 1.<|im_end|>⟧" in output


def test_check_shows_which_answers_count(kolotune: Call, tmp_path: Path, tiny_base: Path) -> None:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate("qarb")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    code, output = kolotune("check", tmp_path / "chats.jsonl", "--base-model", tiny_base, "--train-on", "last")
    assert code == 0
    assert "assistant\na<|im_end|>" in output and "assistant\n⟦b<|im_end|>⟧" in output
    assert "1 answers are not trained on" in output


def test_status_of_a_finished_run(kolotune: Call, finished: Config) -> None:
    code, output = kolotune("status", finished.output_dir)
    assert code == 0
    rows = [line.split() for line in output.splitlines()[2:]]
    assert rows == [[name, "done"] for name in STAGES_WITHOUT_COMPARE]


def test_status_shows_one_reason_and_with_why_all_of_them(kolotune: Call, run_copy: RunFolder) -> None:
    run_copy.gguf.unlink()
    record = json.loads(run_copy.record("convert").read_text().replace("0.3.36", "0.1"))
    del record["sha256"]  # of the record as it was
    run_copy.record("convert").write_text(json.dumps(record))
    short, long = kolotune("status", run_copy.root)[1], kolotune("status", run_copy.root, "--why")[1]
    assert "llama-cpp-python changed from 0.1 to 0.3.36" in short
    assert "Merged.gguf is missing" not in short
    assert "llama-cpp-python changed from 0.1 to 0.3.36; Merged.gguf is missing" in long


def test_status_as_json(kolotune: Call, finished: Config) -> None:
    code, output = kolotune("status", finished.output_dir, "--json")
    event = json.loads(output)
    assert code == 0
    assert [(each["stage"], each["state"]) for each in event["rows"]] == [
        (name, "done") for name in STAGES_WITHOUT_COMPARE
    ]


@pytest.mark.parametrize("verb", ["status", "train", "merge", "convert", "quantize", "modelfile", "chat"])
def test_verbs_of_a_run_want_a_run_folder(kolotune: Call, verb: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        code, output = kolotune(verb, folder)
        assert code == 12
        assert "not a run folder" in output
        assert "kolotune run" in output
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["merge", "convert", "quantize", "modelfile"])
def test_a_stage_wants_the_stages_before_it(kolotune: Call, run_copy: RunFolder, verb: str) -> None:
    run_copy.record("train").unlink()
    code, output = kolotune(verb, run_copy.root)
    assert code == 12
    assert f"{verb} needs train" in output
    assert "Run `kolotune train " in output


def test_train_with_another_base_wants_its_chats_prepared(
    kolotune: Call, run_copy: RunFolder, tiny_base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    with (other / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    code, output = kolotune("train", run_copy.root, "--base-model", other)
    assert code == 12
    assert "train needs prepare" in output and "tokenizer_config.json" in output
    command = output.partition("Run `kolotune ")[2].partition("` first")[0].split()
    assert command == ["prepare", "--output-dir", str(run_copy.root), "--base-model", str(other)]
    code, output = kolotune(*command)
    assert code == 0, output


def test_modelfile_rewrites_only_the_modelfiles(kolotune: Call, run_copy: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_copy.root.rglob("*.gguf")}
    adapter = (run_copy.adapter / "adapter_model.safetensors").stat().st_ino
    code, output = kolotune("modelfile", run_copy.root, "--system", 'Say "aye"', "--parameter", "temperature=0.3")
    assert code == 0, output
    assert "system changed from nothing to" in output
    for path in (run_copy.modelfile(), run_copy.modelfile("Q4_K_M")):
        assert 'SYSTEM """Say "aye' in path.read_text() or 'Say "aye"' in path.read_text()
        assert "PARAMETER temperature 0.3" in path.read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (run_copy.adapter / "adapter_model.safetensors").stat().st_ino == adapter
    code, output = kolotune("modelfile", run_copy.root, "--system", 'Say "aye"')
    assert "done before" in output
    code, output = kolotune("modelfile", run_copy.root, "--system", "")
    assert code == 0
    assert "aye" not in run_copy.modelfile().read_text()


def test_quantize_makes_another_and_keeps_the_first(kolotune: Call, run_copy: RunFolder) -> None:
    first = run_copy.quantized("Q4_K_M").read_bytes()
    code, output = kolotune("quantize", run_copy.root, "--quantization", "q8_0")
    assert code == 0, output
    assert run_copy.quantized("Q8_0").stat().st_size > 1000
    assert run_copy.quantized("Q4_K_M").read_bytes() == first
    output = kolotune("status", run_copy.root)[1]
    assert "modelfile  will run  quantization changed" in " ".join(output.split(" "))
    assert kolotune("modelfile", run_copy.root)[0] == 0
    assert "FROM ./MergedQ8_0.gguf" in run_copy.modelfile("Q8_0").read_text()


def test_merge_elsewhere_gives_the_runs_own_merged_model(kolotune: Call, finished: Config, tmp_path: Path) -> None:
    run = RunFolder(finished.output_dir)
    flags = ["--adapter", run.adapter, "--base", finished.base_model]
    code, output = kolotune("merge", *flags, "--out", tmp_path / "merged")
    assert code == 0, output
    ours = (run.merged_model / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == ours
    code, output = kolotune("merge", *flags, "--out", tmp_path / "merged")
    assert code == 2
    assert "merged: already exists" in output
    for wrong in (["--adapter", run.adapter], ["--out", tmp_path / "x"], ["--base", "b"]):
        code, output = kolotune("merge", *wrong)
        assert code == 2
        assert "--adapter and --out need each other" in output
    code, output = kolotune("merge", "--adapter", tmp_path, "--base", finished.base_model, "--out", tmp_path / "x")
    assert code == 4
    assert "holds no adapter" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_a_folder_of_checkpoints_names_the_newest(verb: str, kolotune: Call, finished: Config, tmp_path: Path) -> None:
    source = tmp_path / "trained"
    for step in (500, 1000):
        shutil.copytree(RunFolder(finished.output_dir).adapter, source / f"checkpoint-{step}")
    arguments = {
        "export": [source, "--output-dir", tmp_path / "e"],
        "merge": ["--adapter", source, "--base", finished.base_model, "--out", tmp_path / "m"],
    }
    code, output = kolotune(verb, *arguments[verb])
    assert code == 4
    assert "holds no adapter" in output and str(source / "checkpoint-1000") in output.replace("\n", "")
    assert not (tmp_path / "e").exists() and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("base", "guess"),
    [
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B"),
        ("/kaggle/input/gemma-2/transformers/gemma-2-2b-it/2", "--base"),
        (None, "--base"),
    ],
)
def test_an_adapter_whose_base_is_not_at_hand(
    base: str | None, guess: str, kolotune: Call, finished: Config, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(RunFolder(finished.output_dir).adapter, tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": base}
    file.write_text(json.dumps(config), encoding="utf-8")
    code, output = kolotune("export", adapter, "--output-dir", tmp_path / "e")
    assert code == 2
    assert "--base" in output and guess in output
    assert not (tmp_path / "e").exists()


def test_an_adapter_of_another_base_is_refused_and_nothing_is_left(
    kolotune: Call, finished: Config, tmp_path: Path, tiny_model: Any, tiny_base: Path
) -> None:
    tiny_model("llama", tmp_path / "other")
    shutil.copyfile(tiny_base / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    adapter = RunFolder(finished.output_dir).adapter
    code, output = kolotune("merge", "--adapter", adapter, "--base", tmp_path / "other", "--out", tmp_path / "x")
    assert code == 11
    assert "base model" in output
    assert "--base" in output
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
def test_export_of_a_merged_folder(kolotune: Call, finished: Config, tmp_path: Path) -> None:
    run = RunFolder(finished.output_dir)
    source = Path(shutil.copytree(run.merged_model, tmp_path / "merged"))
    code, output = kolotune("export", source, "--output-dir", tmp_path / "e", "--quantization", "none")
    assert code == 0, output
    made = RunFolder(tmp_path / "e")
    names = {".kolotune", "Merged.gguf", "Modelfile", "config.yaml", "manifest.json"}
    assert {path.name for path in made.root.iterdir()} == names
    assert made.modelfile().read_text() == run.modelfile().read_text()
    comparison = Comparison.read(made.comparison)
    assert comparison.passed and comparison.samples and comparison.not_kept == ()
    checks = {check.name: check.against for check in comparison.checked if check.kl_mean is not None}
    assert checks == {"model": "", "f16 GGUF": "model"}
    output = kolotune("status", made.root)[1]
    assert "will run" not in output
    assert "train" not in output
    assert kolotune("modelfile", made.root, "--system", "x")[0] == 0
    code, output = kolotune("export", source, "--output-dir", made.root, "--quantization", "none")
    assert code == 0
    assert "converting to GGUF" not in output


@pytest.mark.slow
def test_export_of_an_adapter_and_chat_with_it(kolotune: Call, finished: Config, tmp_path: Path) -> None:
    run = RunFolder(finished.output_dir)
    flags = ["--base", finished.base_model, "--output-dir", tmp_path / "e"]
    code, output = kolotune("export", run.adapter, *flags)
    assert code == 0, output
    made = RunFolder(tmp_path / "e")
    assert made.gguf.is_file()
    assert made.modelfile("Q4_K_M").read_text() == run.modelfile("Q4_K_M").read_text()
    comparison = Comparison.read(made.comparison)
    assert comparison.passed and comparison.samples
    assert [check.name for check in comparison.checked if check.kl_mean is not None] == [
        "adapter on base", "merged", "f16 GGUF", "Q4_K_M"
    ]  # fmt: skip
    assert "Compared on" in output and "sample chats" in output
    code, output = kolotune("export", run.adapter, *flags, "--no-compare", "--system", "x")
    assert code == 0 and "Compared on" not in output
    asked = ["--prompt", "hi", "--max-tokens", "6", "--temperature", "0"]
    assert kolotune("chat", made.root, *asked) == kolotune("chat", run.root, *asked)


@pytest.mark.parametrize("name", ["empty", "none"])
def test_export_of_nothing(kolotune: Call, name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, output = kolotune("export", tmp_path / name, "--output-dir", tmp_path / "e")
    assert code in (4, 5)
    assert str(tmp_path / name) in output
    assert "Traceback" not in output
    assert not list((tmp_path / "e").glob("M*"))


def test_chat_answers_and_is_the_same_each_time(kolotune: Call, finished: Config) -> None:
    asked = ["chat", finished.output_dir, "--prompt", "hi", "--max-tokens", "6", "--seed", "3"]
    code, first = kolotune(*asked)
    assert code == 0
    assert first.strip()
    assert kolotune(*asked) == (code, first)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--quantization", "Q8_0"], 11, "Merged.gguf, MergedQ4_K_M.gguf"),
        (["--quantization", "nonsense"], 11, "no such GGUF"),
    ],
)
def test_chat_with_what_is_not_there(kolotune: Call, finished: Config, flags: list[str], code: int, words: str) -> None:
    found, output = kolotune("chat", finished.output_dir, "--prompt", "hi", *flags)
    assert (found, words in output) == (code, True)


def test_chat_refuses_a_gguf_that_is_not_the_runs(kolotune: Call, run_copy: RunFolder) -> None:
    shutil.copyfile(run_copy.gguf, run_copy.quantized("Q4_K_M"))
    code, output = kolotune("chat", run_copy.root, "--prompt", "hi")
    assert code == 11
    assert "is not the file that the run made" in output


def test_chat_reads_from_a_pipe_and_ends_with_it(finished: Config, tmp_path: Path) -> None:
    argv = [*PROGRAM, "chat", str(finished.output_dir), "--max-tokens", "3"]
    done = subprocess.run(argv, input="hi\nand you?\n", cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.count("> ") == 3
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_chat_with_the_base_model(kolotune: Call, finished: Config, tmp_path: Path, monkeypatch: Any) -> None:
    from kolotune.foundation.cache import cache_folder

    toolchain = cache_folder("toolchain")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "toolchain").symlink_to(toolchain)
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    asked = ["chat", finished.output_dir, "--prompt", "hi", "--base", "--max-tokens", "4"]
    code, output = kolotune(*asked)
    assert code == 0, output
    assert "converting" in output
    assert len(list((tmp_path / "cache" / "base_ggufs").rglob("*.gguf"))) == 2
    assert "converting" not in kolotune(*asked)[1]


@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_planted_token_is_written_nowhere(
    source: str, kolotune: Call, tiny_base: Path, write_chats: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The token must not leak: not where it is unused, not on failure, and not when the hub is asked."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "token").write_text(TOKEN + "\n")
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    more = ["--hf-token", tmp_path / "token"] if source == "file" else []
    flags = ["--base-model", tiny_base, "--output-dir", "o", *more]
    wanted = [
        (["prepare", write_chats(), *flags], 0),
        (["run", "missing.jsonl", *flags], 3),
        (["run", write_chats(), "--base-model", "-no/such", *more], 5),
        (["check", "missing.jsonl", *flags[:2], *more], 3),
    ]
    for arguments, expected in wanted:
        code, output = kolotune(*arguments)
        assert code == expected, output
        assert TOKEN not in output
    assert TOKEN.encode() not in all_bytes(folder)


def test_a_token_from_standard_input_is_read_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{}\n")
    arguments = ["run", "c.jsonl", "--base-model", "no/such", "--hf-token", "-"]
    code, output = real(*arguments, cwd=tmp_path, typed=TOKEN + "\n", HF_HUB_OFFLINE="1")
    assert code == 7
    assert "******** (from standard input)" in output
    assert TOKEN not in output
    assert TOKEN.encode() not in all_bytes(tmp_path)
    code, output = real(*arguments, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "no token in the input" in output


def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    argv = [*PROGRAM, "models"]
    done = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    done.wait(60)
    assert b"Traceback" not in done.stderr.read()


def test_a_terminal_of_another_encoding_stops_nothing(tmp_path: Path) -> None:
    code, output = real("init", "⟦日本⟧", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert code == 0
    assert "wrote ????" in output
    assert (tmp_path / "⟦日本⟧" / "chats.jsonl").is_file()


def test_an_interruption_before_any_stage_is_130_and_said(kolotune: Call, monkeypatch: Any, write_chats: Any) -> None:
    from kolotune.base_models import lookup

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lookup, "resolve", interrupted)
    code, output = kolotune("check", write_chats())
    assert code == 130
    assert "error: interrupted" in output
    assert "Traceback" not in output
