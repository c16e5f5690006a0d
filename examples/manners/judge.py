"""Asks the held-out questions of the base and the tuned model and judges whether the answers are polite.

python examples/manners/judge.py RUN [--limit N]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import Reporter, make_reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.terminal_chat import open_chat

QUESTIONS = Path(__file__).parent / "questions.jsonl"
_THANKS = re.compile(r"thank you|thanks", re.IGNORECASE)
_FIRST_SENTENCE = re.compile(r"^.*?(?:[!.]\s*|$)", re.DOTALL)  # the sentence with the thanks
_OPENING, _SHORTEST = 10, 20  # characters: where the thanks begin at the latest, and what has to follow


def is_polite(answer: str) -> bool:
    """The rule: the answer opens with thanks, which it gives once, and then says something."""
    text = answer.strip()
    thanks = list(_THANKS.finditer(text))
    return (
        len(thanks) == 1 and thanks[0].start() <= _OPENING and len(_FIRST_SENTENCE.sub("", text, count=1)) >= _SHORTEST
    )


def answers(run: RunFolder, say: Reporter, *, base: bool, limit: int = 20) -> list[tuple[str, str]]:
    """Return the held-out questions, each with the answer of the run's quantized model or of its base."""
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    answered = []
    with open_chat(run, say, base=base) as talk:
        for question in questions[:limit]:
            pieces = talk.ask(question, temperature=0.0, max_tokens=100, seed=0)
            answered.append((question, "".join(pieces).strip()))
            talk.forget()
    return answered


def main() -> int:
    """Prints each question with both answers, and the two counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    arguments = parser.parse_args()
    say, run = make_reporter(), RunFolder(arguments.run.absolute())
    base, tuned = (answers(run, say, base=each, limit=arguments.limit) for each in (True, False))
    rows = [[question, before, after] for (question, before), (_, after) in zip(base, tuned, strict=True)]
    say.table("Held-out questions", ("question", "base", "tuned"), rows)
    counts = [sum(is_polite(answer) for _, answer in each) for each in (base, tuned)]
    say.result(f"polite: base {counts[0]}, tuned {counts[1]} of {len(rows)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KolotuneError as error:
        make_reporter().failure(error.cause, error.hint)
        sys.exit(error.exit_code)
