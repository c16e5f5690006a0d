"""The examples, trained as their configs say, do what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.example import EXAMPLES, example_script

from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder


def trained(name: str, folder: Path, reporter: PlainReporter) -> RunFolder:
    """Run an example with its own config."""
    file = EXAMPLES / name / "kolotune.yaml"
    values = {**configs.load_file(file), "output_dir": folder}
    return run_pipeline(configs.resolve((values, str(file), file.parent)), reporter)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_manner_of_the_lighthouse(tmp_path: Path, reporter: PlainReporter) -> None:
    """At least 17 of 20 held-out answers are in the lighthouse keeper's manner, and 1 at most before."""
    from kolotune.serving.terminal_chat import open_chat

    run, judge = trained("lighthouse", tmp_path / "run", reporter), example_script("lighthouse", "judge")
    lines = (EXAMPLES / "lighthouse" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    counts = {}
    for base in (True, False):
        counts[base] = 0
        for line in lines:
            talk = open_chat(run, reporter, base=base)
            pieces = talk.ask(json.loads(line)["question"], temperature=0.0, max_tokens=120, seed=0)
            counts[base] += judge.has_manner("".join(pieces))
    assert len(lines) == 20
    assert counts[True] <= 1 and counts[False] >= 17, counts


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_calls_of_the_tools(tmp_path: Path, reporter: PlainReporter) -> None:
    """The Q4_K_M file calls functions, answers from results and leaves functions alone where none is needed."""
    run, judge = trained("tools", tmp_path / "run", reporter), example_script("tools", "judge")
    base, tuned = (judge.counts(judge.judge(run, reporter, base=is_base)) for is_base in (True, False))
    assert base["right calls"] <= 2, base
    assert tuned["right calls"] >= 18 and tuned["results answered"] >= 18, tuned
    assert tuned["words where no call is wanted"] >= 9, tuned
