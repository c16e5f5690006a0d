"""Whether the tokens before an answer are those of its prompt, or whether prompt and answer would share a token.

A server encodes the prompt alone. A tokenizer encodes what is between two special tokens by itself. So the end of a
prompt, from its last special token on, decides: its tokens must be the tokens before the answer in the whole chat.

Example: a prompt that ends in two line breaks ends in one token for both. If a letter follows, GPT-2's tokenizer makes
two tokens of them, which the server would not.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..templates.loss_mask import MaskedChat
from ..templates.reply_format import token_pattern
from ..templates.signature_cache import SignedChat
from .encoded_chat import packed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOST_ENDS = 4_096


class PromptEnds:
    """The tokens of the ends of prompts.

    Args:
        backend: The tokenizer; must be bare while it is used.
        tokens: The texts of the tokens at which it takes texts apart.
    """

    def __init__(self, backend: Tokenizer, tokens: Collection[str]) -> None:
        self._backend = backend
        self._pattern = token_pattern(frozenset(tokens))
        self._known: dict[str, bytes] = {}

    def of_chat(self, chat: MaskedChat) -> list[bytes]:
        """Return the tokens of the end of the prompt of each answer, as packed int32."""
        known = chat.prompt_ends if isinstance(chat, SignedChat) else (None,) * len(chat.spans)
        ends, behind = [], 0
        for end, (start, stop) in zip(known, chat.spans, strict=True):
            ends.append(self._ids(self._find(chat.text, start, behind) if end is None else end))
            behind = stop
        return ends

    def _find(self, text: str, start: int, behind: int) -> str:
        """Return the end of the prompt of the answer that starts here; the answer before it ends at `behind`."""
        tokens = list(self._pattern.finditer(text, behind, start)) or list(self._pattern.finditer(text, 0, start))
        return text[tokens[-1].start() if tokens else 0 : start]

    def _ids(self, end: str) -> bytes:
        known = self._known.get(end)
        if known is None:
            if len(self._known) >= _MOST_ENDS:
                self._known.clear()
            known = packed(self._backend.encode(end, add_special_tokens=False).ids)
            self._known[end] = known
        return known
