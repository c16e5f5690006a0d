"""The tokenizer and chat template of a trained model, and the prompts that they write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.chats import Chat
from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.chats.templates.rendering import has_thought
from kolotune.chats.templates.reply_format import end_token
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.encoded_chat import EncodedChat
from kolotune.chats.tokens.encoder import Encoder
from kolotune.chats.tokens.tokenizer import chat_template, load_tokenizer, special_tokens, template_text
from kolotune.chats.traits import ChatTrait
from kolotune.foundation.errors import DataError, TemplateError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.ollama.template_derivation import NotDerivable, derive
from kolotune.ollama.turn_format import TurnFormat

from .prompt_battery import battery
from .prompt_proof import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OF_PLAIN_TEXT = frozenset(
    (ChatTrait.QUESTION, ChatTrait.SPACES, ChatTrait.COMBINING_MARKS, ChatTrait.COMPATIBILITY_FORMS)
)
"""Traits that a prompt can have which is a text and nothing else."""


@dataclass
class TrainedFormat:
    """How a model's conversations are written and tokenized.

    Attributes:
        end: the token that ends an answer.
        turns: the format that Ollama's TEMPLATE is derived from; None where it can't be derived.
    """

    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    encoder: Encoder
    end: str
    turns: TurnFormat | None

    @classmethod
    def load(cls, folder: Path, jinja: str = "", learns_empty_thoughts: bool = False) -> TrainedFormat:
        """Read the tokenizer and template in a folder.

        Args:
            folder: the folder.
            jinja: replaces its template.
            learns_empty_thoughts: as in `Encoder`.

        Raises:
            ModelError, TemplateError: they are missing or can't be used.
        """
        tokenizer = load_tokenizer(folder)
        template = chat_template(tokenizer, jinja or template_text(folder))
        special = frozenset(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        turns = derive(
            lambda messages, opened: template.render(messages, None, opened),
            special_tokens(tokenizer).get("bos_token", ""),
        )
        return cls(
            tokenizer,
            template,
            Encoder(template, tokenizer, learns_empty_thoughts),
            end_token(template, special),
            None if isinstance(turns, NotDerivable) else turns,
        )

    @cached_property
    def _whole_answers(self) -> Encoder:
        """An encoder that labels answers from their first token on, also if it is that of an empty thought."""
        return Encoder(self.template, self.tokenizer, learns_empty_thoughts=True)

    @property
    def end_id(self) -> int:
        """The id of the token that ends an answer."""
        index = self.tokenizer.convert_tokens_to_ids(self.end)
        assert isinstance(index, int)
        return index

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        /,
        **switches: bool,
    ) -> str:
        """Return the text before an answer; a `TemplateError` where the template refuses the turns."""
        return self.template.render(messages, tools, True, any(switches.values()))

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, messages: list[JsonObject], tools: list[JsonObject] | None, thinks: bool = False) -> Prompt:
        """Return the prompt for an answer to these turns.

        The rendered text is encoded as a whole, as a server does. `prepare` encodes chats differently.

        Args:
            messages, tools: what is before the answer.
            thinks: the answer has thoughts, which a template with switches writes in another way.

        Raises:
            TemplateError: the template refuses the turns.
        """
        switches = dict.fromkeys(self.template.switches, thinks)
        text = self.render(messages, tools, **switches)
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return Prompt(
            messages,
            tools or [],
            text,
            self.tokens(text),
            plain=self._is_plain(messages, tools, text),
            is_normalized=normalizer is not None and normalizer.normalize_str(text) != text,
            switches=switches,
        )

    def _is_plain(self, messages: list[JsonObject], tools: list[JsonObject] | None, text: str) -> bool:
        if tools or any(set(turn) > {"role", "content"} or turn["role"] == "tool" for turn in messages):
            return False
        # Where these differ, the `modelfile` stage has reported it.
        return self.turns is None or self.turns.render(messages, True) == text

    def trained_prompt(self, chat: Chat, name: str) -> Prompt:
        """Return the prompt of the chat's last turn, an answer, with the tokens that training has before it."""
        *before, _ = chat.message_dicts()
        tools = list(chat.tools)
        try:
            encoded = self._whole_answers.encode(chat)
            prompt = self.prompt(before, tools, has_thought(chat.messages[-1]))
        except (TemplateError, DataError) as error:
            return Prompt(before, tools, name=name, refusal=error.cause)
        if encoded.special_in_content:
            return Prompt(before, tools, name=name, refusal="special tokens in a text are trained as plain text")
        ids = _before_last_answer(encoded)
        return dataclasses.replace(prompt, ids=ids, name=name, merges=prompt.ids != ids)

    def battery(self) -> list[Prompt]:
        """Return the prompts of the battery, and both sides of them where the template has switches."""
        sides = (False, True) if self.template.switches else (False,)
        prompts = [self.trained_prompt(chat, trait) for thinks in sides for trait, chat in battery(thinks).items()]
        if is_plain_text(self.template.jinja):
            return [prompt for prompt in prompts if prompt.name in _OF_PLAIN_TEXT]
        return prompts

    def decode(self, ids: list[int] | None) -> str | None:
        """Return the text of an answer without special tokens; None for no answer."""
        return None if ids is None else str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _before_last_answer(encoded: EncodedChat) -> list[int]:
    start = sum(encoded.lengths[:-1])
    labels = encoded.packed_labels[start:]
    return encoded.ids[start : start + labels.rfind(b"\0\1") + 1]
