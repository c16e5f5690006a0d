"""Asks the held-out questions of the base and the tuned model and judges calls and answers by the example's rule.

python examples/tools/judge.py RUN

Both models are served by llama.cpp's own server and asked through OpenAI's client, as any other program would.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import Reporter, make_reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import choose_quantization, saved_config, verified_gguf
from kolotune.serving.base_gguf import base_gguf

FOLDER = Path(__file__).parent
CONTEXT = 2048  # the longest question, with its functions, has some 600 tokens
LONGEST_ANSWER = 120
SHOWN = 160
"""Characters of a reply in the table."""


@dataclass(frozen=True)
class Verdict:
    """What came of one question.

    Attributes:
        question: The question.
        needs_call: Whether it needs a call.
        reply: The calls and words that came.
        is_right: One call, of the right function with the right arguments; words where no call is wanted.
        answer: The words that followed the result of a right call, or "".
        is_answered: Whether they have every value of the result.
    """

    question: str
    needs_call: bool
    reply: str
    is_right: bool
    answer: str = ""
    is_answered: bool = False


def judge(run: RunFolder, reporter: Reporter, *, base: bool) -> list[Verdict]:
    """Ask the tuned model, or its base with the trained template, all held-out questions.

    Raises:
        KolotuneError: the run has no GGUF, or it is not what the run made.
    """
    config = saved_config(run)
    name = choose_quantization(config, None)
    if base:
        gguf, template = base_gguf(run, config, name, reporter), template_of(trained_folder(run)).jinja
    else:
        gguf, template = verified_gguf(run, name)[0], None
    functions = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    with client_of(gguf, template) as client:
        return [ask(client, json.loads(line), functions) for line in lines]


@contextmanager
def client_of(gguf: Path, template: str | None = None) -> Iterator[Any]:
    """Serve a GGUF with its own or another chat template, and give OpenAI's client for it."""
    import openai
    import xllamacpp

    key = secrets.token_urlsafe()
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.chat_template, parameters.use_jinja = str(gguf), template or "", True
    parameters.hostnames, parameters.port, parameters.api_keys = ["127.0.0.1"], 0, [key]
    parameters.n_ctx, parameters.n_parallel = CONTEXT, 1
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    parameters.warmup, parameters.ui, parameters.verbosity = False, False, 1
    server = xllamacpp.Server(parameters)
    with openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key=key) as client:
        yield client
    del server


def ask(client: Any, question: dict[str, Any], functions: list[dict[str, Any]]) -> Verdict:
    """Ask one question and, after a right call, for the answer that its result gives."""
    messages = [*question.get("before", []), {"role": "user", "content": question["question"]}]
    reply = _reply(client, messages, functions)
    calls = reply.tool_calls or []
    shown = " ".join([reply.content or "", *(f"{call.function.name} {call.function.arguments}" for call in calls)])
    needs_call = "function" in question
    is_right = is_right_call(calls, question) if needs_call else is_in_words(reply)
    if not (needs_call and is_right):
        return Verdict(question["question"], needs_call, shown.strip(), is_right)
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": json.dumps(question["result"])}
    answer = _reply(client, [*messages, reply.model_dump(exclude_none=True), result], functions)
    is_answered = is_in_words(answer) and has_values(answer.content, question["result"])
    return Verdict(question["question"], True, shown.strip(), True, answer.content or "", is_answered)


def is_right_call(calls: list[Any], question: dict[str, Any]) -> bool:
    """Whether there is one call, of the right function, with exactly the right arguments."""
    if len(calls) != 1 or calls[0].function.name != question["function"]:
        return False
    try:
        return bool(json.loads(calls[0].function.arguments) == question["arguments"])
    except json.JSONDecodeError:
        return False


def is_in_words(reply: Any) -> bool:
    """Whether a reply has words and no call, nor anything that was meant as one."""
    return bool(reply.content and reply.content.strip()) and not reply.tool_calls and "tool_call" not in reply.content


def has_values(answer: str, result: dict[str, Any]) -> bool:
    """Whether an answer has every value of a result; a number or a time counts only as a whole."""
    return all(
        re.search(rf"(?<![\w:.-]){re.escape(str(value))}(?![\w:-]|\.\d)", answer, re.IGNORECASE)
        for value in result.values()
    )


def counts(verdicts: list[Verdict]) -> dict[str, int]:
    """Count what is right, by what is counted."""
    return {
        "right calls": sum(verdict.is_right for verdict in verdicts if verdict.needs_call),
        "results answered": sum(verdict.is_answered for verdict in verdicts),
        "words where no call is wanted": sum(verdict.is_right for verdict in verdicts if not verdict.needs_call),
    }


def _reply(client: Any, messages: list[dict[str, Any]], functions: list[dict[str, Any]]) -> Any:
    completion = client.chat.completions.create(
        model="any", messages=messages, tools=functions, temperature=0, max_tokens=LONGEST_ANSWER, seed=0
    )
    return completion.choices[0].message


def main() -> int:
    """Print each question with what both models made of it, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run, reporter = RunFolder(parser.parse_args().run.absolute()), make_reporter()
    base, tuned = (judge(run, reporter, base=is_base) for is_base in (True, False))
    rows = [
        [
            before.question,
            textwrap.shorten(before.reply, SHOWN),
            textwrap.shorten(" → ".join(filter(None, [after.reply, after.answer])), SHOWN),
        ]
        for before, after in zip(base, tuned, strict=True)
    ]
    reporter.table("Held-out questions", ("question", "base", "tuned"), rows)
    calls = sum(verdict.needs_call for verdict in tuned)
    for (kind, count), of in zip(counts(tuned).items(), (calls, calls, len(tuned) - calls), strict=True):
        reporter.result(f"{kind}: base {counts(base)[kind]}, tuned {count} of {of}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KolotuneError as error:
        make_reporter().failure(error.cause, error.hint)
        sys.exit(error.exit_code)
