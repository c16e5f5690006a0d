"""The examples, trained as their configs say, do what they promise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.example import EXAMPLES, example_script

from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import install
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder


def trained(name: str, folder: Path, reporter: PlainReporter, config: str = "kolotune.yaml") -> RunFolder:
    """Run an example with a config of its own."""
    file = EXAMPLES / name / config
    values = {**configs.load_file(file), "output_dir": folder}
    return run_pipeline(configs.resolve((values, str(file), file.parent)), reporter)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_manner_of_the_lighthouse(tmp_path: Path, reporter: PlainReporter) -> None:
    """At least 17 of 20 held-out answers are in the lighthouse keeper's manner, and 1 at most before."""
    run, judge = trained("lighthouse", tmp_path / "run", reporter), example_script("lighthouse", "judge")
    base, tuned = (judge.answers(run, reporter, each) for each in (True, False))
    counts = [sum(judge.has_manner(answer) for _, answer in each) for each in (base, tuned)]
    assert len(tuned) == 20
    assert counts[0] <= 1 and counts[1] >= 17, counts


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("config", ["kolotune.yaml", "dpo.yaml", "ipo.yaml", "simpo.yaml", "kto.yaml"])
def test_the_manners_that_are_preferred(config: str, tmp_path: Path, reporter: PlainReporter) -> None:
    """At least 16 of 20 held-out answers are polite, and 2 at most before."""
    run, judge = trained("manners", tmp_path / "run", reporter, config), example_script("manners", "judge")
    counts = [
        sum(judge.is_polite(answer) for _, answer in judge.answers(run, reporter, base=base)) for base in (True, False)
    ]
    assert counts[0] <= 2 and counts[1] >= 16, counts


@pytest.fixture(scope="module")
def tools_run(tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> RunFolder:
    """The example with tools, trained."""
    return trained("tools", tmp_path_factory.mktemp("tools") / "run", reporter)


def assert_good(verdicts: list[Any]) -> None:
    """The tuned model calls functions, answers from results and leaves functions alone where none is needed."""
    counts = example_script("tools", "judge").counts(verdicts)
    assert counts["right calls"] >= 18 and counts["results answered"] >= 18, verdicts
    assert counts["words where no call is wanted"] >= 9, verdicts


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_calls_of_the_quantized_file(tools_run: RunFolder, reporter: PlainReporter) -> None:
    judge = example_script("tools", "judge")
    assert judge.counts(judge.judge(tools_run, reporter, base=True))["right calls"] <= 2
    assert_good(judge.judge(tools_run, reporter))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_model_with_tools_goes_into_ollama(tools_run: RunFolder, reporter: PlainReporter, any_ollama: str) -> None:
    """What a real one makes of the questions is judged, too; the stand-in does not answer with calls."""
    client, name = OllamaClient(any_ollama), f"kolotune-test-{os.urandom(4).hex()}"
    try:
        install(tools_run, name, reporter, client=client)
        shown = client.show(name)
        assert shown is not None and "tools" in shown["capabilities"]
        if os.environ.get("OLLAMA_HOST"):
            assert_good(example_script("tools", "judge").judge(tools_run, reporter, in_ollama=True))
    finally:
        client.delete(name)
