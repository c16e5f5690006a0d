"""Asks the held-out questions of the base and the tuned model and judges calls and answers by the example's rule.

python examples/tools/judge.py RUN [--ollama]

Both models are served by llama.cpp's own server, or the tuned one by Ollama, and asked through OpenAI's client, as any
other program would ask them.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.chats.tokens.tokenizer import template_of
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.reporter import Reporter, make_reporter
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import installed_name
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import choose_quantization, saved_config, verified_gguf
from kolotune.serving.base_gguf import base_gguf

sys.path.append(str(Path(__file__).parents[1]))
import judging  # beside the examples

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


def judge(run: RunFolder, reporter: Reporter, *, base: bool = False, in_ollama: bool = False) -> list[Verdict]:
    """Ask all held-out questions.

    Args:
        run: The run.
        reporter: Shows when the base model has to be converted first.
        base: Ask the base model, with the trained template, in place of the tuned one.
        in_ollama: Ask the model that was installed in Ollama in place of the run's file.

    Raises:
        KolotuneError: The run has no GGUF, it is not what the run made, or it was not installed.
    """
    functions = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    with served_in_ollama(run) if in_ollama else served(run, reporter, base) as client:
        return [ask(client, json.loads(line), functions) for line in lines]


@contextmanager
def served(run: RunFolder, reporter: Reporter, base: bool) -> Iterator[Client]:
    """Serve a run's GGUF, or its base with the trained template, by llama.cpp."""
    config = saved_config(run)
    name = choose_quantization(config, None)
    gguf = base_gguf(run, config, name, reporter) if base else verified_gguf(run, name)[0]
    template = template_of(trained_folder(run)).jinja if base else ""
    with ModelServer(gguf, ServerSettings(context=CONTEXT, template=template)) as server:
        yield Client(server.address, server.key, "tuned", server.end_texts)


@contextmanager
def served_in_ollama(run: RunFolder) -> Iterator[Client]:
    """Take the model that was installed in Ollama."""
    yield Client(OllamaClient().url, "none", installed_name(run))


class Client:
    """OpenAI's client, for one model of a server.

    Args:
        address: The server's.
        key: What requests must have.
        model: The model's name there.
        stops: Stops that the server does not know itself.
    """

    def __init__(self, address: str, key: str, model: str, stops: tuple[str, ...] = ()) -> None:
        import openai

        self._api, self._model = openai.OpenAI(base_url=f"{address}/v1", api_key=key), model
        self._fixed = {"temperature": 0, "max_tokens": LONGEST_ANSWER, "seed": 0} | ({"stop": stops} if stops else {})

    def reply(self, messages: list[dict[str, Any]], functions: list[dict[str, Any]]) -> Any:
        """Return the most likely reply: an object with `content` and `tool_calls`."""
        create: Any = self._api.chat.completions.create
        completion = create(model=self._model, messages=messages, tools=functions, **self._fixed)
        return completion.choices[0].message


def ask(client: Client, question: dict[str, Any], functions: list[dict[str, Any]]) -> Verdict:
    """Ask one question and, after a right call, for the answer that its result gives."""
    messages = [*question.get("before", []), {"role": "user", "content": question["question"]}]
    reply = client.reply(messages, functions)
    calls = reply.tool_calls or []
    shown = " ".join([reply.content or "", *(f"{call.function.name} {call.function.arguments}" for call in calls)])
    needs_call = "function" in question
    is_right = is_right_call(calls, question) if needs_call else is_in_words(reply)
    if not (needs_call and is_right):
        return Verdict(question["question"], needs_call, shown.strip(), is_right)
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": json.dumps(question["result"])}
    answer = client.reply([*messages, reply.model_dump(exclude_none=True), result], functions)
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


def main() -> int:
    """Print each question with what both models made of it, and the counts."""
    parser = judging.parser(__doc__)
    parser.add_argument("--ollama", action="store_true", help="ask the tuned model where it was installed, in Ollama")
    arguments = parser.parse_args()
    run, reporter = RunFolder(arguments.run.absolute()), make_reporter()
    base, tuned = judge(run, reporter, base=True), judge(run, reporter, in_ollama=arguments.ollama)
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
    judging.run_script(main)
