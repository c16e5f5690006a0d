"""Where the loss falls: on every assistant turn and its end token, and on nothing else.

`locate` finds the answers as character spans of the rendered chat, `encode` turns them into token ids and
labels. Nothing is guessed from a template's look. The chat is rendered a second time with marks in place of
its contents (the skeleton): the text between the marks is what the template wrote, and the real rendering has
to be that text with the contents in between. An answer starts where the prompt ends that the model is served
with; it ends behind the token that ends its turn. What can't be proven in this way is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kolotune.chats import Chat
from kolotune.chats.template import ChatTemplate, Rendering, Skeleton, Span, check_shown
from kolotune.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NEVER_STOPS = "the template ends an answer with no special token: the model would never learn to stop"


@dataclass(frozen=True)
class Located:
    """A rendered chat and what is what in it; all positions count characters of `text`.

    Attributes:
        text: the whole rendering.
        spans: for each assistant turn, in order, where it starts and ends (its end token is inside).
        turn_starts: where each exchange starts: 0, then behind the answer before each further user turn.
        slots: where the chat's own texts stand; None where that could not be told for all of them.
        skeleton: the rendering with marks in place of the contents.
    """

    text: str
    spans: tuple[Span, ...]
    turn_starts: tuple[int, ...]
    slots: tuple[Span, ...] | None
    skeleton: str


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        ids: the token ids of the whole rendering.
        labelled: for each id, whether the loss falls on it; as long as `ids`.
        turn_starts: the index into `ids` where each exchange starts: a user's turn and all up to the next
            user's turn that follows an answer. The first is 0. Cutting there leaves whole exchanges.
        special_in_content: a content holds the text of a special token; it was encoded as plain text.
        boundary_merge: a token holds both the end of a prompt and the start of an answer. It is not
            labelled, and the served prompt will end with another token than the one trained on.
    """

    ids: list[int]
    labelled: list[bool]
    turn_starts: list[int]
    special_in_content: bool
    boundary_merge: bool


@dataclass(frozen=True)
class Probe:
    """What a template does, seen on a chat of two turns.

    Attributes:
        end_token: the special token that ends an answer.
        opening: what the template writes to open a reply when the model is to generate; may be empty.
    """

    end_token: str
    opening: str


@lru_cache(maxsize=32)
def probe(template: ChatTemplate, special: frozenset[str]) -> Probe:
    """How a template opens and ends answers.

    Args:
        template: the chat template.
        special: the texts of the tokenizer's special tokens.

    Returns:
        What was seen.

    Raises:
        TemplateError: the template can't render a question and an answer, or ends an answer with no special
            token, so that the model would never learn to stop.
    """
    question = [{"role": "user", "content": "\ue0010\ue001"}]
    answer = "\ue0011\ue001"
    finished = [*question, {"role": "assistant", "content": answer}]
    try:
        tools = None
        whole = template.render(finished)
    except TemplateError:
        # The second template of some models is for chats with tools only.
        tools = [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}]
        whole = template.render(finished, tools)
    prompt = template.render(question, tools, add_generation_prompt=True)
    plain = template.render(question, tools)
    if whole.count(answer) != 1 or question[0]["content"] not in whole:
        raise TemplateError("the chat template does not write a question and its answer once each")
    before, behind = whole.split(answer)
    end = _end_token(behind, special, template)
    if end is None:
        raise TemplateError(_NEVER_STOPS)
    if _pattern(special).sub("", behind).strip():
        raise TemplateError(f"the chat template writes more of a turn behind its answer: {behind!r}")
    cut = _common(prompt, plain)
    # Not inside a token: `<|end|>` and `<|endoftext|>` begin alike.
    cut = next((m.start() for m in _pattern(special).finditer(prompt) if m.start() < cut < m.end()), cut)
    if cut == len(prompt) and not before.startswith(prompt):
        raise TemplateError("the template opens replies otherwise than it writes finished answers")
    return Probe(end[1], prompt[cut:])


def end_token(template: ChatTemplate, special: Collection[str]) -> str:
    """The special token with which a template ends an answer; see `probe` for the errors."""
    return probe(template, frozenset(special)).end_token


@lru_cache(maxsize=32)
def _pattern(special: frozenset[str]) -> re.Pattern[str]:
    """Matches special tokens, the longest first, as the tokenizer does."""
    texts = sorted((text for text in special if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _end_token(text: str, special: frozenset[str], template: ChatTemplate) -> re.Match[str] | None:
    """The special token with which a text begins, white space aside; or the end of sequence, where it is in
    the same row of tokens (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`): generating only stops there."""
    token, eos = _pattern(special).pattern, str(template.special_tokens.get("eos_token", ""))
    row = re.compile(rf"\s*(?:{token})*?({re.escape(eos)})").match(text) if eos in special else None
    return row or re.compile(rf"\s*({token})").match(text)


def _json(value: Any) -> str:
    """The inside of a value as JSON, to search texts in structures."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _common(one: str, other: str) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def locate(chat: Chat, template: ChatTemplate, special: Collection[str]) -> Located:
    """Render a chat and find its answers.

    Args:
        chat: the chat; at least one turn of it is the assistant's.
        template: the base model's template, with the date frozen.
        special: the texts of the tokenizer's special tokens.

    Returns:
        The text and the answers' spans, which don't overlap and are in order.

    Raises:
        TemplateError: the template refuses the chat, leaves out a part of it that the model should see or
            learn, does not end answers with a special token, or opens a reply otherwise when serving than
            in training.
    """
    special = frozenset(special)
    seen = probe(template, special)
    rendering = Rendering(chat, template)
    skeleton = rendering.skeleton()
    check_shown(chat, rendering, skeleton)
    return _Locator(rendering, seen, special, skeleton, skeleton.fit(rendering.text)).located()


@dataclass
class _Locator:
    """Finds the spans of one rendered chat."""

    rendering: Rendering
    seen: Probe
    special: frozenset[str]
    skeleton: Skeleton
    fitted: list[Span] | None

    def located(self) -> Located:
        text = self.rendering.text
        spans: list[Span] = []
        starts, answered = [0], False
        for index, message in enumerate(self.rendering.messages):
            if message["role"] == "assistant":
                spans.append(self._span(index, spans[-1][1] if spans else 0))
                answered = True
            elif message["role"] == "user" and answered:
                rest = text[spans[-1][1] :]
                starts.append(len(text) - len(rest.lstrip()))
                answered = False
        slots = None if self.fitted is None else tuple(self.fitted)
        return Located(text, tuple(spans), tuple(starts), slots, self.skeleton.text)

    def _span(self, index: int, behind: int) -> Span:
        slots = self._slots(index)
        if not slots:
            raise TemplateError("an answer has no text that could be trained on")
        start = self._start(index, behind, min(start for start, _ in slots.values()))
        end = self._end(index, slots)
        if not behind <= start < end:
            raise TemplateError("the template writes the turns in another order than the chat has them")
        for call in self.rendering.messages[index].get("tool_calls", ()):
            name = str(call.get("function", call).get("name", ""))
            if name not in self.rendering.text[start:end]:
                raise TemplateError(f"this base model's template leaves out the call of {name}")
        return start, end

    def _slots(self, index: int) -> dict[str, Span]:
        """Where the texts of one message stand; of a name that is written again later, the first place."""
        skeleton, fitted = self.skeleton, self.fitted
        if fitted is None:
            # Some other message changes what the template does: let only this one be marked.
            skeleton = self.rendering.skeleton({index})
            fitted = skeleton.fit(self.rendering.text)
        if fitted is None:
            raise TemplateError("the template changes the text of an answer: what to train on can't be told")
        found: dict[str, Span] = {}
        for (at, name), span in zip(skeleton.slots, fitted, strict=True):
            if at == index:
                if name == "content" and name in found:
                    raise TemplateError("the template writes an answer more than once")
                found.setdefault(name, span)
        return found

    def _start(self, index: int, behind: int, left: int) -> int:
        """Where the model goes on from the prompt that it is served with; `left` is where the turn's own
        texts begin, `behind` where the turn before ends."""
        text, opening = self.rendering.text, self.seen.opening
        alone = bool(opening) and _json(opening) not in _json(self.rendering.messages)
        if index:
            prompt = self.rendering.render(self.rendering.messages[:index], prompt=True)
            if text.startswith(prompt) and len(prompt) >= behind:
                return len(prompt)
            # The template writes earlier turns otherwise once later ones follow. What it writes between the
            # last message and the reply, or at least the opening of a reply, has to be there all the same.
            tail = self.rendering.skeleton(upto=index, prompt=True)
            for slot, (_, end) in reversed(list(zip(self.skeleton.slots, self.fitted or (), strict=False))):
                if tail.slots and slot == tail.slots[-1] and slot[0] == index - 1 and end <= left:
                    if text.startswith(tail.pieces[-1], end):
                        return end + len(tail.pieces[-1])
                    behind, alone = end, True
                    break
        if not alone:
            raise TemplateError("where an answer starts in this template can't be told")
        at = text.rfind(opening, behind, left)
        if not opening or at < 0 or self.seen.end_token in text[at + len(opening) : left]:
            shared = next(n for n in range(len(opening), -1, -1) if text.endswith(opening[:n], behind, left))
            raise TemplateError(
                f"the template opens a reply with {opening[shared:]!r} when the model generates, but does "
                "not write that in front of a finished answer: training and serving would differ"
            )
        return at + len(opening)

    def _end(self, index: int, slots: dict[str, Span]) -> int:
        """Behind the special token that ends the turn."""
        text, messages = self.rendering.text, self.rendering.messages
        right = max(end for _, end in slots.values())
        if "call" not in slots and "content" in slots:
            match = _end_token(text[right:], self.special, self.rendering.template)
            if match is None:
                raise TemplateError(_NEVER_STOPS)
            # gpt-oss ends all but the last answer with a token that must not stop the model: not learned.
            return right + match.end() if match[1] == self.seen.end_token else right
        # Behind the name in a call, or behind thinking without an answer, the template writes more. The turn
        # is over where the chat up to here is, or at the first end token, if that is before the next message.
        upto = text if index + 1 == len(messages) else self.rendering.render(messages[: index + 1])
        if text.startswith(upto):
            end = _closing(upto, self.special, self.seen.end_token)
            if end is not None and end > right:
                return end
        at = text.find(self.seen.end_token, right)
        later = [span[0] for slot, span in zip(self.skeleton.slots, self.fitted or (), strict=False) if slot[0] > index]
        if at < 0 or self.fitted is None or at > min(later, default=at):
            raise TemplateError("where a turn with tool calls ends in this template can't be told")
        return at + len(self.seen.end_token)


def _closing(text: str, special: frozenset[str], end_token: str) -> int | None:
    """Where the turn that a text closes with ends: an end-of-text token may follow the end of the turn."""
    end: int | None = None
    limit = len(text)
    for match in reversed(list(_pattern(special).finditer(text))):
        if text[match.end() : limit].strip():
            break
        if match[0] == end_token:
            return match.end()
        end = match.end() if end is None else end
        limit = match.start()
    return end


@dataclass
class _Tokens:
    """Token ids with the characters that they stand for: begin and end of each."""

    ids: list[int]
    begins: list[int]
    ends: list[int]

    def add(self, ids: Sequence[int], offsets: Sequence[Span], base: int) -> None:
        self.ids += ids
        self.begins += [base + begin for begin, _ in offsets]
        self.ends += [base + end for _, end in offsets]


def encode(chat: Chat, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> EncodedChat:
    """Token ids of a chat, and which of them the loss falls on.

    Args:
        chat: the chat; at least one turn of it is the assistant's.
        template: the base model's template, with the date frozen.
        tokenizer: the base model's tokenizer. Settings of its backend are changed for the time of the call
            and put back: don't use one tokenizer from two threads.

    Returns:
        ``ids`` and ``labelled``, both of one length T; see `EncodedChat`.

    Raises:
        TemplateError: see `locate`.
        DataError: a content holds the text of a special token and this tokenizer can't write that as plain
            text, or the tokens don't give the text back.
    """
    special = _special_tokens(tokenizer)
    found = locate(chat, template, special)
    backend: Any = tokenizer.backend_tokenizer
    inside = _special_in_content(chat, _pattern(frozenset(special)))
    with _bare(backend):
        if inside:
            tokens = _encode_apart(found, backend, special)
            labels = None
        else:
            tokens = _encode(backend, found.text)
            labels = _labels_by_parts(backend, found, tokens.ids)
        _check_decodes(found, tokens.ids, backend, tokenizer)
    merged = False
    if labels is None:
        labels = [any(start <= begin < end for start, end in found.spans) for begin in tokens.begins]
        places = list(zip(tokens.begins, tokens.ends, strict=True))
        merged = any(begin < start < end for begin, end in places for start, _ in found.spans)
    starts = [
        next((index for index, begin in enumerate(tokens.begins) if begin >= at), len(tokens.ids))
        for at in found.turn_starts
    ]
    return EncodedChat(tokens.ids, labels, starts, inside, merged)


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """The special tokens of a tokenizer: text to (id, takes white space before it, behind it)."""
    found = {
        str(token.content): (index, bool(token.lstrip), bool(token.rstrip))
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for text in tokenizer.all_special_tokens:
        found.setdefault(str(text), (tokenizer.convert_tokens_to_ids(text), False, False))
    return found


@contextmanager
def _bare(backend: Any) -> Iterator[None]:
    """The tokenizer with nothing that cuts, fills up or rounds: a post-processor may trim white space off
    the offsets, and what an earlier caller asked for (truncation, padding) stays set in the backend."""
    post, as_text = backend.post_processor, backend.encode_special_tokens
    truncation, padding = backend.truncation, backend.padding
    backend.post_processor, backend.encode_special_tokens = None, False
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.post_processor, backend.encode_special_tokens = post, as_text
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _encode(backend: Any, text: str) -> _Tokens:
    """The whole text as one, special tokens parsed: as llama.cpp reads a rendered prompt."""
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError("a text holds half a character (a lone surrogate)") from error
    tokens = _Tokens([], [], [])
    tokens.add(encoding.ids, encoding.offsets, 0)
    return tokens


def _labels_by_parts(backend: Any, found: Located, ids: list[int]) -> list[bool] | None:
    """Labels from encoding prompts and answers apart; None when that gives other ids than the whole."""
    bounds = [0, *(bound for span in found.spans for bound in span), len(found.text)]
    labels: list[bool] = []
    joined: list[int] = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        part = backend.encode(found.text[start:end], add_special_tokens=False).ids if end > start else []
        joined += part
        labels += [number % 2 == 1] * len(part)
    return labels if joined == ids else None


def _special_in_content(chat: Chat, pattern: re.Pattern[str]) -> bool:
    """Whether a text of the chat holds a special token's text.

    Raises:
        DataError: one stands where it can't be told from what the template writes.
    """
    for message in chat.messages:
        shell = json.dumps([message.tool_calls, message.name, message.tool_call_id], ensure_ascii=False)
        if match := pattern.search(shell):
            raise DataError(f"a tool call holds the text of the special token {match[0]}")
    if match := pattern.search(json.dumps(chat.tools, ensure_ascii=False)):
        raise DataError(f"a tool's definition holds the text of the special token {match[0]}")
    texts = (text for message in chat.messages for text in (message.content, message.reasoning or ""))
    return any(pattern.search(text) for text in texts)


def _encode_apart(found: Located, backend: Any, special: Mapping[str, Any]) -> _Tokens:
    """The special tokens that the template wrote as such, all other text as plain text."""
    reason, pattern = "a message holds the text of a special token", _pattern(frozenset(special))
    if found.slots is None:
        raise DataError(f"{reason}, which can't be told from those that the chat template writes")
    # What is done here is what the tokenizer itself does, or it is not done: seen on the skeleton, in which
    # all special tokens are the template's.
    sample = _encode_fragments(backend, found.skeleton, (), special)
    if sample.ids != backend.encode(found.skeleton, add_special_tokens=False).ids:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text exactly")
    tokens = _encode_fragments(backend, found.text, found.slots, special)
    # Only those that the chat mentions: the unknown token may well stand for something else in it.
    texts = [found.text[start:end] for start, end in found.slots]
    mentioned = {token: special[token][0] for token in special if any(token in text for text in texts)}
    bounds = [0, *(bound for slot in found.slots for bound in slot), len(found.text)]
    pieces = [found.text[start:end] for start, end in list(pairwise(bounds))[::2]]
    written = sum(match[0] in mentioned for piece in pieces for match in pattern.finditer(piece))
    if sum(index in mentioned.values() for index in tokens.ids) != written:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text")
    return tokens


def _encode_fragments(backend: Any, text: str, slots: Sequence[Span], special: Mapping[str, Any]) -> _Tokens:
    """Encode the special tokens outside of the slots as such, and the text between as plain text."""
    tokens = _Tokens([], [], [])
    bounds = [0, *(bound for slot in slots for bound in slot), len(text)]
    at = 0

    def plain(until: int) -> None:
        if until > at:
            encoding = backend.encode(text[at:until], add_special_tokens=False)
            tokens.add(encoding.ids, encoding.offsets, at)

    backend.encode_special_tokens = True
    try:
        for start, end in list(pairwise(bounds))[::2]:
            for match in _pattern(frozenset(special)).finditer(text, start, end):
                index, left, right = special[match[0]]
                before, behind = text[at : match.start()], text[match.end() :]
                begin = at + len(before.rstrip()) if left else match.start()
                plain(begin)
                at = match.end() + (len(behind) - len(behind.lstrip()) if right else 0)
                tokens.add([index], [(begin, at)], 0)
        plain(len(text))
    finally:
        backend.encode_special_tokens = False
    return tokens


def _check_decodes(found: Located, ids: list[int], backend: Any, tokenizer: Any) -> None:
    """The ids give the text back, wherever this tokenizer gives texts back at all."""
    if "ByteLevel" not in repr(backend.decoder):
        return  # SentencePiece writes a space and ▁ alike

    def same(text: str, ids: list[int]) -> bool:
        plain = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return bool(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == plain)

    if not same(found.text, ids):
        sample = backend.encode(found.skeleton, add_special_tokens=False).ids
        if same(found.skeleton, sample):
            raise DataError("the tokens don't give the text back: the tokenizer lacks some of it")
