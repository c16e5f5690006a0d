"""The stop strings: texts at which Ollama ends an answer."""

from __future__ import annotations

import re
from collections.abc import Collection

from .turn_format import TurnFormat, common_prefix


def stop_strings(turns: TurnFormat, eos_token: str, end_token: str, special_tokens: Collection[str]) -> tuple[str, ...]:
    """Return the stop strings for a model.

    Args:
        turns: the derived turn format.
        eos_token: the end token of the tokenizer.
        end_token: the token that really ends a turn; may be the same, or "".
        special_tokens: all special tokens of the tokenizer.

    Returns:
        The end tokens, then each special token around finished turns, in the order of a chat. The BOS is left out, and
        so is what the model itself writes between the generation prompt and its answer (a channel, for example).
    """
    before = turns.assistant.before
    written_by_model = before[len(common_prefix(turns.generation, before)) :]
    stops = [end_token, eos_token]
    # The longest first, as the tokenizer reads them.
    tokens = sorted((token for token in special_tokens if token.strip()), key=lambda token: (-len(token), token))
    if tokens:
        pattern = re.compile("|".join(map(re.escape, tokens)))
        for text in turns.texts():
            stops += (token for token in pattern.findall(text) if token not in written_by_model)
    return tuple(dict.fromkeys(stop for stop in stops if stop and stop != turns.bos))
