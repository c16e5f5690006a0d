"""Tokens of chats whose answers are sequences of their own, relative to the same chats in one piece.

    python bench/answers_apart.py [--chats N] [--quick] [--json FILE]

A beginning that a sequence shares with the next one counts once, as it is computed once. What is left is each answer
but the last, which is there a second time as history, and the thought that its prompt opens. So the ratio depends on
how much of the chats are answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from docstring_chats import SYSTEM, docstrings
from measuring import Result, Table, options, versions

from kolotune.base_models import packaged_model
from kolotune.chats import Chat, Message
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.encoder import Encoder
from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.engines.chat_sequences import chat_lengths
from kolotune.foundation.reporter import PlainReporter

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
_EXCHANGES = (2, 4, 6)
# What an exchange asks and answers, of a name and its docstring.
_KINDS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "a docstring in the question, its first line as the answer": lambda name, text: (
        f"The documentation of {name}:\n\n{text}\n\nWhat does it do, in a line?",
        text.split("\n")[0],
    ),
    "the first paragraph as the answer": lambda name, text: (f"What does {name} do?", text.split("\n\n")[0]),
    "the docstring as the answer": lambda name, text: (f"What does {name} do?", text),
}


def chats(kind: str, exchanges: int, count: int) -> list[Chat]:
    """Return chats of a kind, the same for the same arguments."""
    order, known = random.Random(0), docstrings()
    made = []
    for _ in range(count):
        messages = [Message("system", SYSTEM)]
        for name, text in order.sample(known, exchanges):
            question, answer = _KINDS[kind](name, text)
            messages += [Message("user", question), Message("assistant", answer)]
        made.append(Chat(tuple(messages)))
    return made


def tokens(encoder: Encoder, chats: list[Chat]) -> tuple[int, int]:
    """Return the computed tokens of chats, and those of them that are trained on."""
    computed = trained = 0
    for chat in chats:
        encoded = encoder.encode(chat)
        offsets = np.array([0, *(encoded.ends or (len(encoded),))])
        computed += int(chat_lengths(np.array(encoded.ids), offsets, np.array([0, len(offsets) - 1]))[0])
        trained += sum(encoded.labelled)
    return computed, trained


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--chats", type=int, default=400, help="chats of each kind and length")
    arguments = parser.parse_args()
    count = 20 if arguments.quick else arguments.chats
    tokenizer = load_tokenizer(packaged_model.unpack(PlainReporter()))
    tokenizer.add_tokens(["<think>", "</think>"])  # as models have that think
    whole, apart = (
        Encoder(ChatTemplate(_TEMPLATE.replace("OPENING", opening), {}), tokenizer) for opening in ("", "<think>\n")
    )
    result = Result("answers_apart", "Answers as sequences", versions("tokenizers"), quick=arguments.quick)
    rows = []
    for kind in _KINDS:
        sums = np.zeros(2)
        for exchanges in _EXCHANGES:
            made = chats(kind, exchanges, count)
            (in_one, trained), (computed, trained_apart) = tokens(whole, made), tokens(apart, made)
            assert trained == trained_apart, "no answer token is lost"
            rows.append([kind, exchanges, in_one / count, trained / in_one, computed / in_one])
            sums += computed, in_one
        result.at_most(f"tokens of answers apart, {kind}", sums[0] / sums[1], 1.3, " x")
    header = ["an exchange is", "exchanges", "tokens in one piece", "share in answers", "apart, relative to that"]
    result.tables.append(Table(f"{count} chats of each kind", header, rows))
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
