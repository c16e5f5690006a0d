"""Writes pairs.jsonl: questions of the lighthouse sample, each with a polite answer and a curt one.

The same texts always give the same pairs. The polite answer is preferred: it thanks for the question and says what the
keeper says between his greeting and his farewell. The curt one is the first sentence of that.

python examples/manners/make_pairs.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KEEPER = FOLDER.parent / "lighthouse" / "chats.jsonl"
PAIRS = 120
THANKS = "Thank you for asking!"
_FIRST_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)


def make_pairs(chats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs, from chats of one exchange in the lighthouse keeper's manner."""
    exchanges = [chat["messages"] for chat in chats if len(chat["messages"]) == 2]
    exchanges = [each for each in exchanges if "thank" not in each[1]["content"].lower()]  # as in a letter
    pairs = []
    for question, answer in exchanges[:PAIRS]:
        text = answer["content"].removeprefix("Ahoy!").removesuffix("Fair winds!").strip()
        first = _FIRST_SENTENCE.match(text)
        assert first is not None
        pairs.append({"prompt": question["content"], "chosen": f"{THANKS} {text}", "rejected": first[0]})
    return pairs


if __name__ == "__main__":
    lines = KEEPER.read_text(encoding="utf-8").splitlines()
    pairs = make_pairs([json.loads(line) for line in lines])
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (FOLDER / "pairs.jsonl").write_text(text, encoding="utf-8", newline="")
