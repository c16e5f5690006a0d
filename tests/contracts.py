"""Contracts of every engine on every runner: the same results, correct records, resumable work.

A new engine is one more entry of `ENGINES`, a new runner one of `RUNNERS`; the container needs a Docker engine
(`make test-container`). What the pipeline's own tests show of this machine is slow here (`LONG_RUNNERS`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import STAGES_WITHOUT_COMPARE, results

ENGINES = ["native", pytest.param("torchtune", marks=pytest.mark.slow)]
_CONTAINER = pytest.param("container", marks=pytest.mark.container)
RUNNERS, LONG_RUNNERS = ["local", _CONTAINER], [pytest.param("local", marks=pytest.mark.slow), _CONTAINER]
CHATS = 12


class Runner:
    """kolotune on this machine or in the container."""

    def __init__(self, kind: str, request: pytest.FixtureRequest) -> None:
        self.kind = kind
        self._env = dict(os.environ)
        self._more: list[str] = []
        if kind == "container":
            self._env = request.getfixturevalue("container").env()
            self._more = ["--container"]

    def start(self, *arguments: Any, cwd: Path) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "kolotune", *map(str, arguments), *self._more]
        return subprocess.Popen(
            argv, cwd=cwd, env=self._env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: Any, cwd: Path) -> tuple[int, str]:
        child = self.start(*arguments, cwd=cwd)
        output, _ = child.communicate(timeout=570)
        return child.returncode, output


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param, request)


def flags(engine: str, base: Path, **more: Any) -> list[str]:
    """Return the options of a small run. It is not compiled, because the container has no compiler."""
    options = {
        "base-model": base, "engine": engine, "dtype": "fp32", "compile": "off", "epochs": 2, "lora-rank": 2,
        "lora-dropout": 0.1, "batch-size": 2, "learning-rate": 1e-2, "eval-split": 0.2,
        "template-date": "2026-01-02", **more,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), "--no-compare"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with chats."""
    write_chats(tmp_path)
    return tmp_path


def write_chats(folder: Path, count: int = CHATS) -> None:
    def chat(number: int) -> str:
        turns = [("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")]
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"

    (folder / "chats.jsonl").write_text("".join(map(chat, range(count))), encoding="utf-8")


def states(runner: Runner, cwd: Path) -> dict[str, str]:
    code, output = runner("status", "outputs", "--json", cwd=cwd)
    assert code == 0, output
    return {row["stage"]: row["state"] for row in json.loads(output.splitlines()[-1])["rows"]}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Callable[[str], dict[str, str]]:
    """The results of the same run on this machine, made once for each engine."""
    known: dict[str, dict[str, str]] = {}

    def of(engine: str) -> dict[str, str]:
        if engine not in known:
            folder = tmp_path_factory.mktemp(engine)
            write_chats(folder)
            argv = [sys.executable, "-m", "kolotune", "run", "chats.jsonl", *flags(engine, small_base)]
            done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=570)
            assert done.returncode == 0, done.stdout + done.stderr
            known[engine] = results(folder / "outputs")
        return known[engine]

    return of


@pytest.mark.parametrize("runner", LONG_RUNNERS, indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_has_the_same_results_everywhere_and_a_second_one_does_nothing(
    engine: str, runner: Runner, folder: Path, small_base: Path, undisturbed: Callable[[str], dict[str, str]]
) -> None:
    code, output = runner("run", "chats.jsonl", *flags(engine, small_base), cwd=folder)
    assert code == 0, output
    expected = undisturbed(engine)
    assert len(expected) == 7 and results(folder / "outputs") == expected
    assert set(states(runner, folder).items()) == {(name, "done") for name in STAGES_WITHOUT_COMPARE}
    code, output = runner("run", "chats.jsonl", *flags(engine, small_base), cwd=folder)
    assert code == 0 and output.count("done before") == len(STAGES_WITHOUT_COMPARE)
    assert results(folder / "outputs") == expected
    code, output = runner("run", "chats.jsonl", *flags(engine, small_base, quantization="Q8_0"), cwd=folder)
    assert code == 0 and output.count("done before") == 4, output
    assert (folder / "outputs" / "MergedQ8_0.gguf").is_file()


@pytest.mark.parametrize("runner", LONG_RUNNERS, indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupted_training_resumes_from_its_checkpoint(
    engine: str, runner: Runner, folder: Path, small_base: Path
) -> None:
    options = flags(engine, small_base, epochs=400, **{"checkpoint-steps": 5})
    child = runner.start("run", "chats.jsonl", *options, "--json", cwd=folder)
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["title"] == "training" and event["done"] >= 20:
            break
    else:
        pytest.fail(f"it ended too early: {child.wait()}")
    time.sleep(0.5)
    child.terminate()
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 130, output
    assert states(runner, folder)["train"] == "interrupted"
    steps = []
    child = runner.start("train", "outputs", "--use-checkpoint", "--json", cwd=folder)
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["title"] == "training":
            steps.append(event["done"])
            if len(steps) > 2:
                child.terminate()
                break
    child.communicate(timeout=120)
    assert steps and steps[0] >= 20, steps


@pytest.mark.parametrize("runner", RUNNERS, indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("chats", "more", "expected"),
    [("none.jsonl", [], 3), ("chats.jsonl", ["--base-model=./nowhere"], 5), ("chats.jsonl", ["--epochs=x"], 2)],
)
def test_errors_have_the_same_codes_everywhere(
    chats: str, more: list[str], expected: int, engine: str, runner: Runner, folder: Path, small_base: Path
) -> None:
    code, output = runner("run", chats, *flags(engine, small_base), *more, cwd=folder)
    assert code == expected, output
    assert "Traceback" not in output and "/runs/" not in output
    assert {3: "none.jsonl", 5: "nowhere", 2: "epochs"}[expected] in output


@pytest.mark.parametrize("runner", LONG_RUNNERS, indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_training_leaves_its_log(engine: str, runner: Runner, folder: Path, small_base: Path) -> None:
    """One weight of the base model is NaN."""
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(small_base, folder / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, output = runner("run", "chats.jsonl", *flags(engine, broken), cwd=folder)
    assert code == 9, output
    assert states(runner, folder)["train"] == "failed"
    assert (folder / "outputs" / ".kolotune" / "logs" / "train.log").is_file()
    assert not (folder / "outputs" / "adapter").exists()
