"""Asks the held-out questions of the base and the tuned model and judges the answers by the sample's rule.

python examples/lighthouse/judge.py RUN [--limit N]
"""

from __future__ import annotations

import sys
from pathlib import Path

from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

sys.path.append(str(Path(__file__).parents[1]))
import judging  # beside the examples

OPENING, CLOSING = "Ahoy!", "Fair winds!"
QUESTIONS = Path(__file__).parent / "questions.jsonl"


def has_manner(answer: str) -> bool:
    """The rule: the lighthouse keeper's greeting, something between, his farewell, and nothing after it."""
    text = answer.strip()
    between = text.removeprefix(OPENING).removesuffix(CLOSING).strip()
    return text.startswith(OPENING) and text.endswith(CLOSING) and bool(between)


def answers(run: RunFolder, reporter: Reporter, base: bool, limit: int = 20) -> list[tuple[str, str]]:
    """Return the held-out questions, each with the answer of the run's quantized model or of its base."""
    return judging.answers(run, reporter, QUESTIONS, base=base, longest=120, limit=limit)


def main() -> int:
    """Prints each question with both answers, and the two counts."""
    return judging.show(__doc__, answers, has_manner, "in the manner of the sample")


if __name__ == "__main__":
    judging.run_script(main)
