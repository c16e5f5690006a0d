"""Asks the held-out questions of the base and the tuned model and judges whether the answers are polite.

python examples/manners/judge.py RUN [--limit N]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

sys.path.append(str(Path(__file__).parents[1]))
import judging  # beside the examples

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


def answers(run: RunFolder, reporter: Reporter, base: bool, limit: int = 20) -> list[tuple[str, str]]:
    """Return the held-out questions, each with the answer of the run's quantized model or of its base."""
    return judging.answers(run, reporter, QUESTIONS, base=base, longest=100, limit=limit)


def main() -> int:
    """Prints each question with both answers, and the two counts."""
    return judging.show(__doc__, answers, is_polite, "polite")


if __name__ == "__main__":
    judging.run_script(main)
