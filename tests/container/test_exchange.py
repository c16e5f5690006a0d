"""Files that go into the container and come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contracts import flags, results, write_chats
from support.docker_engine import Client

from kolotune.base_models import model_folder
from kolotune.engines.native.checkpointer import TENSORS
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container import names

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def made(container: Client, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was made in the container. Do not change it."""
    folder = tmp_path_factory.mktemp("made")
    write_chats(folder)
    command = ["run", "chats.jsonl", *flags("native", small_base, epochs=1), "--container"]
    code, output = container(*command, cwd=folder)
    assert code == 0, output
    return folder


def host(*arguments: object, cwd: Path) -> tuple[int, str]:
    argv = [sys.executable, "-m", "kolotune", *map(str, arguments)]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def inode(client: Client, path: str) -> str:
    return client.inside("stat", "-c", "%i %Y", path)


def test_a_fetched_run_works_on_this_machine(made: Path, tmp_path: Path) -> None:
    run = RunFolder(made / "outputs")
    code, output = host("status", "outputs", cwd=made)
    assert code == 0 and output.count(" done") == 6, output
    assert "/runs/" not in run.config.read_text() and "/runs/" not in run.job.read_text()
    assert str(made / "chats.jsonl") in run.config.read_text()
    assert not run.checkpoints.exists() and not run.lock.exists() and not run.lock_holder.exists()
    copied = Path(shutil.copytree(made, tmp_path / "copy"))
    code, output = host("run", "--config", run.config, "--output-dir", "outputs", cwd=copied)
    assert code == 0 and output.count("done before") == 6, output


def test_nothing_is_sent_or_fetched_twice(made: Path, container: Client, small_base: Path) -> None:
    run = RunFolder(made / "outputs")
    weights = container.inside("find", str(names.INPUTS), "-name", "model.safetensors").split()
    before = [inode(container, path) for path in weights]
    times = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    code, output = container("run", "chats.jsonl", *flags("native", small_base, epochs=1), "--container", cwd=made)
    assert code == 0 and "fetched" not in output, output
    assert [inode(container, path) for path in weights] == before
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert set(changed) <= {"config.yaml", "brought.json", "choices.json"}, changed


def test_lost_results_are_fetched_again(made: Path, container: Client, small_base: Path) -> None:
    run = RunFolder(made / "outputs")
    expected = results(run.root)
    run.gguf.unlink()
    (run.adapter / "adapter_config.json").write_text("{}")
    code, output = container("run", "chats.jsonl", *flags("native", small_base, epochs=1), "--container", cwd=made)
    assert code == 0 and "Merged.gguf, adapter" in output, output
    assert results(run.root) == expected and "peft_type" in (run.adapter / "adapter_config.json").read_text()


def test_a_run_that_was_started_here_continues_inside(container: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    code, output = host("prepare", "chats.jsonl", "--base-model", small_base, "--dtype", "fp32", cwd=tmp_path)
    assert code == 0, output
    before = RunFolder(tmp_path / "outputs").record("prepare").read_bytes()
    code, output = container("train", "outputs", "--epochs", "1", "--container", cwd=tmp_path)
    assert code == 0, output
    assert "prepare" not in output.replace("prepared", "")
    run = RunFolder(tmp_path / "outputs")
    assert run.adapter.is_dir() and run.record("prepare").read_bytes() == before
    code, output = host("status", "outputs", cwd=tmp_path)
    assert output.count(" done") == 2, output


def test_results_can_stay_inside_and_checkpoints_can_be_fetched(
    container: Client, small_base: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path)
    command = ["run", "chats.jsonl", *flags("native", small_base, epochs=1), "--container"]
    code, output = container(*command, "--leave-inside", cwd=tmp_path)
    assert code == 0, output
    assert not (tmp_path / "outputs").exists()
    code, output = container("status", "outputs", "--container", cwd=tmp_path)
    assert output.count(" done") == 6 and not (tmp_path / "outputs").exists(), output
    code, output = container(*command, "--with-checkpoints", cwd=tmp_path)
    assert code == 0 and output.count("done before") == 6
    checkpoints = RunFolder(tmp_path / "outputs").checkpoints
    assert list(checkpoints.rglob(TENSORS))


def test_the_records_of_a_failed_run_are_fetched(container: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    with (tmp_path / "chats.jsonl").open("a") as chats:
        chats.write("{no json\n")
    code, output = container("run", "chats.jsonl", *flags("native", small_base), "--container", cwd=tmp_path)
    assert code == 3 and f"{tmp_path}/chats.jsonl:13" in output, output
    run = RunFolder(tmp_path / "outputs")
    assert "DataError" in run.log("error").read_text()


def test_an_adapter_and_a_merge_elsewhere(made: Path, container: Client, small_base: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(RunFolder(made / "outputs").adapter, tmp_path / "adapter")
    command = ["merge", "--adapter", adapter, "--base", small_base, "--out", "merged", "--container"]
    code, output = container(*command, cwd=tmp_path)
    assert code == 0 and f"merged: {tmp_path / 'merged'}" in output, output
    model_folder.check_model_folder(tmp_path / "merged")
    assert container.inside("ls", str(names.OUTSIDE)) == ""
    code, output = container(*command, cwd=tmp_path)
    assert code == 2 and "already" in output
    command = [
        "export",
        "adapter",
        "--base",
        small_base,
        "--output-dir",
        "exported",
        "--quantization",
        "none",
        "--no-compare",
    ]
    code, output = container(*command, "--container", cwd=tmp_path)
    assert code == 0, output
    exported = RunFolder(tmp_path / "exported")
    assert json.loads(exported.source.read_text())["source"] == str(tmp_path / "adapter")
    code, output = host("status", "exported", cwd=tmp_path)
    assert "will run" not in output and "done" in output, output


def test_odd_file_names(container: Client, small_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "$(id); 'ä\n\""
    folder.mkdir()
    write_chats(folder)
    os.rename(folder / "chats.jsonl", folder / "-; rm -rf ~ 日本.jsonl")
    command = ["check", "--base-model", small_base, "--container", "--", "-; rm -rf ~ 日本.jsonl"]
    code, output = container(*command, cwd=folder)
    assert code == 0 and "No problems found" in output, output
    code, output = container(*command, "none.jsonl", cwd=folder)
    assert code == 3 and "none.jsonl" in output and "Traceback" not in output


def test_the_same_chats_under_two_names(container: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    shutil.copyfile(tmp_path / "chats.jsonl", tmp_path / "again.jsonl")
    command = ["check", "chats.jsonl", "again.jsonl", "--base-model", small_base, "--container"]
    code, output = container(*command, cwd=tmp_path)
    assert code == 0 and "12 exact copies" in output, output


def test_json_events_are_passed_on(made: Path, container: Client) -> None:
    code, output = container("status", "outputs", "--json", "--container", cwd=made)
    (line,) = output.splitlines()
    assert code == 0 and json.loads(line)["title"] == str(made / "outputs")


def test_a_chat(made: Path, container: Client) -> None:
    command = ["chat", "outputs", "--max-tokens", "4", "--seed", "3", "--container"]
    code, output = container(*command, cwd=made, stdin="hi\nand you?\n")
    assert code == 0 and sum(line.startswith("> ") for line in output.splitlines()) == 3 and "Traceback" not in output
    code, first = container(*command, "--prompt", "hi", cwd=made)
    assert code == 0 and first.strip()
    assert container(*command, "--prompt", "hi", cwd=made) == (0, first)
    code, output = container("chat", "outputs", "--prompt", "hi", "--quantization", "Q8_0", "--container", cwd=made)
    assert code == 11 and str(made / "outputs") in output
