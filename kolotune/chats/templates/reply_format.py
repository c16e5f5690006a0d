"""How a template opens and ends replies, as seen on a chat of two turns."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix

from kolotune.foundation.errors import TemplateError

from .template import ChatTemplate

NEVER_STOPS = "the template ends an answer with no special token: the model would never learn to stop"


@dataclass(frozen=True)
class ReplyFormat:
    """How a template opens and ends a reply.

    Attributes:
        end_token: The special token that ends an answer.
        opening: What the template writes to open a reply when the model is to generate; may be empty.
        special: Matches any special token.
        one_token: Matches a special token behind white space.
        up_to_eos: Matches special tokens up to the end of sequence; None if the tokenizer has no such token.
    """

    end_token: str
    opening: str
    special: re.Pattern[str]
    one_token: re.Pattern[str]
    up_to_eos: re.Pattern[str] | None

    @classmethod
    def of(cls, template: ChatTemplate, special: Collection[str]) -> ReplyFormat:
        """Return the format of a template, given the texts of the tokenizer's special tokens.

        Raises:
            TemplateError: The template can't render a question and an answer, or ends an answer with no special
                token, so that the model would never learn to stop.
        """
        pattern = token_pattern(frozenset(special))
        one_token = re.compile(rf"\s*({pattern.pattern})")
        # Several special tokens up to the end of sequence (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`): generating stops
        # at that one only.
        eos = str(template.special_tokens.get("eos_token", ""))
        up_to_eos = re.compile(rf"\s*(?:{pattern.pattern})*?({re.escape(eos)})") if eos in special else None
        question, answer = "\ue0010\ue001", "\ue0011\ue001"
        first = [{"role": "user", "content": question}]
        both = [*first, {"role": "assistant", "content": answer}]
        tools = None
        try:
            whole = template.render(both)
        except TemplateError:
            # The second template of some models is only for chats with tools.
            tools = [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}]
            whole = template.render(both, tools)
        prompt = template.render(first, tools, add_generation_prompt=True)
        plain = template.render(first, tools)
        if whole.count(answer) != 1 or question not in whole:
            raise TemplateError("the chat template does not write a question and its answer once each")
        before, behind = whole.split(answer)
        end = _end_at(behind, one_token, up_to_eos)
        if end is None:
            raise TemplateError(NEVER_STOPS)
        if pattern.sub("", behind).strip():
            raise TemplateError(f"the chat template writes more of a turn behind its answer: {behind!r}")
        cut = len(commonprefix([prompt, plain]))  # noqa: RUF071 - of texts, not of paths
        # Not inside a token: `<|end|>` and `<|endoftext|>` share a prefix.
        cut = next((m.start() for m in pattern.finditer(prompt) if m.start() < cut < m.end()), cut)
        if cut == len(prompt) and not before.startswith(prompt):
            raise TemplateError("the template opens replies differently than it writes finished answers")
        return cls(end[1], prompt[cut:], pattern, one_token, up_to_eos)

    def end_at(self, text: str) -> re.Match[str] | None:
        """Match the special token that a text starts with, after white space, or the end of sequence that follows."""
        return _end_at(text, self.one_token, self.up_to_eos)

    def end_of_turn(self, text: str) -> int | None:
        """Return where the last turn of a text ends; an end-of-text token may follow the end of the turn."""
        end: int | None = None
        limit = len(text)
        for match in reversed(list(self.special.finditer(text))):
            if text[match.end() : limit].strip():
                break
            if match[0] == self.end_token:
                return match.end()
            end = match.end() if end is None else end
            limit = match.start()
        return end


def end_token(template: ChatTemplate, special: Collection[str]) -> str:
    """Return the special token with which a template ends an answer; see `ReplyFormat.of` for the errors."""
    return ReplyFormat.of(template, special).end_token


@lru_cache(maxsize=32)
def token_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Return an expression that matches any of these tokens, the longest first, as the tokenizer does."""
    texts = sorted((text for text in tokens if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _end_at(text: str, one_token: re.Pattern[str], up_to_eos: re.Pattern[str] | None) -> re.Match[str] | None:
    return (up_to_eos.match(text) if up_to_eos else None) or one_token.match(text)
