"""Asks the held-out questions of the base and the tuned model and judges the answers by the sample's rule.

python examples/lighthouse/judge.py RUN [--limit N]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import make_reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.terminal_chat import open_chat

OPENING, CLOSING = "Ahoy!", "Fair winds!"


def has_manner(answer: str) -> bool:
    """The rule: the lighthouse keeper's greeting, something between, his farewell, and nothing after it."""
    text = answer.strip()
    between = text.removeprefix(OPENING).removesuffix(CLOSING).strip()
    return text.startswith(OPENING) and text.endswith(CLOSING) and bool(between)


def main() -> int:
    """Prints each question with both answers, and the two counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    arguments = parser.parse_args()
    file = Path(__file__).parent / "questions.jsonl"
    questions = [json.loads(line)["question"] for line in file.read_text(encoding="utf-8").splitlines()]
    questions = questions[: arguments.limit]
    say = make_reporter()
    counts = {}
    answers: dict[str, list[str]] = {}
    for name, base in (("base", True), ("tuned", False)):
        answers[name] = []
        with open_chat(RunFolder(arguments.run.absolute()), say, base=base) as talk:
            for question in questions:
                answers[name].append("".join(talk.ask(question, temperature=0.0, max_tokens=120, seed=0)).strip())
                talk.forget()
        counts[name] = sum(map(has_manner, answers[name]))
    rows = zip(questions, answers["base"], answers["tuned"], strict=True)
    say.table("Held-out questions", ("question", "base", "tuned"), [list(row) for row in rows])
    say.result(f"in the manner of the sample: base {counts['base']}, tuned {counts['tuned']} of {len(questions)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KolotuneError as error:
        make_reporter().failure(error.cause, error.hint)
        sys.exit(error.exit_code)
