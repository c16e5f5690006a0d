"""Read chats that are written as one text, with marks before what each side says.

Known are the marks of ChatML (``<|im_start|>user``), of Llama 2 (``[INST] … [/INST]``), Llama 3, Gemma, and Zephyr,
Phi and Open Assistant (``<|user|>``), ``### Human:`` or ``Human:`` with ``### Assistant:`` or ``Assistant:``, Alpaca's
``### Instruction:`` and ``### Response:``, and Glaive's ``USER:``, ``ASSISTANT:`` and ``FUNCTION RESPONSE:``.
"""

from __future__ import annotations

import re

from kolotune.foundation.typed_storage import JsonObject

from .roles import role_of

_USER = "user|human|prompter"
# Where a mark is in a text, the pattern finds the role and what it says.
_BY_TOKENS = (
    ("<|im_start|>", re.compile(r"<\|im_start\|>\s*(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)),
    (
        "<|start_header_id|>",
        re.compile(r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>(.*?)(?:<\|eo[tm]_id\|>|\Z)", re.DOTALL),
    ),
    ("<start_of_turn>", re.compile(r"<start_of_turn>\s*(\w+)\n(.*?)(?:<end_of_turn>|\Z)", re.DOTALL)),
    (
        "<|assistant|>",
        re.compile(
            rf"<\|(system|{_USER}|assistant)\|>(.*?)"
            rf"(?:</s>|<\|end\|>|<\|endoftext\|>|(?=<\|(?:{_USER}|assistant)\|>)|\Z)",
            re.DOTALL,
        ),
    ),
)
_INST = re.compile(r"\[INST\]\s*(.*?)\s*\[/INST\]\s*(.*?)\s*(?=</s>|<s>|\[INST\]|\Z)", re.DOTALL)
_INST_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
_MISTRAL_SYSTEM = re.compile(r"\[SYSTEM_PROMPT\](.*)\[/SYSTEM_PROMPT\]", re.DOTALL)
_START = re.compile(r"\A\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<\|endoftext\|>)")
_SIDES = {
    "system": "system", "human": "user", "user": "user", "instruction": "user", "assistant": "assistant",
    "gpt": "assistant", "response": "assistant", "function response": "tool", "input": "input",
}  # fmt: skip
_MARK = re.compile(
    r"(?:#{2,3}[ \t]*(Human|User|Assistant|Instruction|Input|Response|System)[ \t]*:"
    r"|^[ \t]*(Human|User|Assistant|System|FUNCTION RESPONSE|USER|ASSISTANT|SYSTEM)[ \t]*:)[ \t]*",
    re.MULTILINE,
)
_ENDS = ("<|endoftext|>", "</s>", "<s>")
_ANSWER_MARKS = (
    "[/INST]", "<|im_start|>assistant", "<|end_header_id|>", "<start_of_turn>model", "<|assistant|>", "Assistant:",
    "ASSISTANT:", "Response:",
)  # fmt: skip
_ANSWER_ENDS = (*_ENDS, "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>")


def turns_of_text(text: str) -> list[JsonObject] | None:
    """Return the turns of a chat that is written as one text; None if it has no known marks."""
    for mark, pattern in _BY_TOKENS:
        if mark in text:
            found = list(pattern.finditer(text))
            return [*_before(text, found[0]), *[_turn(match[1], match[2]) for match in found]] if found else None
    if "[INST]" in text:
        return _llama_2(text)
    return _marked(text)


def turns_of_prompt(text: str) -> list[JsonObject] | None:
    """Return the turns of a prompt with marks whose last is that of the answer to come; None for other texts."""
    text = text.rstrip()
    if not text.endswith(_ANSWER_MARKS):
        return None
    turns = turns_of_text(f"{text}\n") or []
    roles = [role_of(str(turn["role"])) for turn in turns]
    if turns and roles[-1] == "assistant" and not turns[-1]["content"]:
        turns, roles = turns[:-1], roles[:-1]
    return turns if turns and roles[-1] != "assistant" and "user" in roles else None


def without_end(answer: str) -> str:
    """Return the answer to a prompt with marks, without the mark of its end."""
    answer = answer.strip()
    for end in _ANSWER_ENDS:
        answer = answer.removesuffix(end).rstrip()
    return answer


def _llama_2(text: str) -> list[JsonObject]:
    found = list(_INST.finditer(text))
    turns = _before(text, found[0]) if found else []
    for question, answer in (match.groups() for match in found):
        if match := _INST_SYSTEM.match(question):
            turns.append(_turn("system", match[1]))
            question = question[match.end() :]
        turns.append(_turn("user", question))
        if answer:
            turns.append(_turn("assistant", answer))
    return turns


def _before(text: str, first: re.Match[str]) -> list[JsonObject]:
    """Return what is said before the first mark as a system turn."""
    said = _START.sub("", text[: first.start()]).strip()
    system = _MISTRAL_SYSTEM.fullmatch(said)
    return [_turn("system", system[1] if system else said)] if said else []


def _marked(text: str) -> list[JsonObject] | None:
    marks = list(_MARK.finditer(text))
    # An answer may contain the marks of another style.
    marks = [mark for mark in marks if _style(mark) == _style(marks[0])]
    sides = [_SIDES[(mark[1] or mark[2]).lower()] for mark in marks]
    if "user" not in sides or "assistant" not in sides:
        return None
    turns: list[JsonObject] = []
    if before := text[: marks[0].start()].strip():
        turns.append(_turn("system", before))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, side, end in zip(marks, sides, ends, strict=True):
        said = text[mark.end() : end].strip()
        for token in _ENDS:
            said = said.removesuffix(token).strip()
        if side == "input" and turns:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said}".strip()
        elif side == "assistant" and said.startswith("<functioncall>"):
            turns.append(_turn("function_call", said))
        else:
            turns.append(_turn(side, said))
    return turns


def _style(mark: re.Match[str]) -> tuple[bool, bool]:
    return mark[1] is not None, (mark[1] or mark[2]).isupper()


def _turn(role: str, content: str) -> JsonObject:
    return {"role": role, "content": content.strip()}
