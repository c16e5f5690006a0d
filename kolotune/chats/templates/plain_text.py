"""The chat template of a base model that has none: it writes the texts of turns and nothing else.

A server then hands a prompt to the model as it is, and the model continues it. So a model that was trained on plain
text is served as it was trained.
"""

from __future__ import annotations

_TURNS = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def plain_text_template(*, begins: bool) -> str:
    """Return the Jinja source.

    Args:
        begins: Whether the tokenizer puts its BOS token in front of a text.
    """
    return ("{{ bos_token }}" if begins else "") + _TURNS


def is_plain_text(jinja: str) -> bool:
    """Whether a template is one of `plain_text_template`."""
    return jinja.endswith(_TURNS)
