"""What the judges of the examples have in common: they ask a run's models held-out questions, and show what came."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import Reporter, make_reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.terminal_chat import open_chat


def answers(
    run: RunFolder, reporter: Reporter, file: Path, *, base: bool, longest: int, limit: int | None = None
) -> list[tuple[str, str]]:
    """Ask questions, each in a conversation of its own; return them with the most likely answers.

    Args:
        run: the run.
        reporter: shows when the base model has to be converted first.
        file: JSON Lines with a `question` each.
        base: ask the base model, with the trained template, in place of the run's quantized model.
        longest: tokens of an answer.
        limit: how many questions; None: all.

    Raises:
        KolotuneError: the run has no GGUF, or it is not what the run made.
    """
    lines = file.read_text(encoding="utf-8").splitlines()[:limit]
    answered = []
    with open_chat(run, reporter, base=base) as talk:
        for question in (json.loads(line)["question"] for line in lines):
            pieces = talk.ask(question, temperature=0.0, max_tokens=longest, seed=0)
            answered.append((question, "".join(pieces).strip()))
            talk.forget()
    return answered


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of a judge's arguments, which has the run."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("run", type=Path)
    return made


def show(
    description: str | None,
    ask: Callable[[RunFolder, Reporter, bool, int], list[tuple[str, str]]],
    is_good: Callable[[str], bool],
    what: str,
) -> int:
    """Print each question with the base's and the tuned model's answer, and how many of each are good.

    Args:
        description: of the script.
        ask: as `answers`, with the run, a reporter, whether to ask the base, and how many questions to ask.
        is_good: the example's rule.
        what: what is counted.
    """
    options = parser(description)
    options.add_argument("--limit", type=int, default=20)
    arguments = options.parse_args()
    reporter, run = make_reporter(), RunFolder(arguments.run.absolute())
    base, tuned = (ask(run, reporter, each, arguments.limit) for each in (True, False))
    rows = [[question, before, after] for (question, before), (_, after) in zip(base, tuned, strict=True)]
    reporter.table("Held-out questions", ("question", "base", "tuned"), rows)
    counts = [sum(is_good(answer) for _, answer in each) for each in (base, tuned)]
    reporter.result(f"{what}: base {counts[0]}, tuned {counts[1]} of {len(rows)}")
    return 0


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a judge, and end this process; an expected error is shown as kolotune shows it."""
    try:
        sys.exit(main())
    except KolotuneError as error:
        make_reporter().failure(error.cause, error.hint)
        sys.exit(error.exit_code)
