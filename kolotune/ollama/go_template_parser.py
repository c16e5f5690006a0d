"""Parse a Go template: the part of the language that Modelfiles of chats use.

A template that uses more of the language is refused, because a guess could be wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from kolotune.foundation.errors import ArtifactError

_ACTION = re.compile(
    r"\{\{(?P<left>-(?=\s))?(?P<code>(?:\"(?:[^\"\\\n]|\\.)*\"|`[^`]*`|[^\"`])*?)(?P<right>(?<=\s)-)?\}\}"
)
_WORD = re.compile(
    r"""\s*(?:
      (?P<text>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
    | (?P<number>-?\d+)
    | (?P<variable>\$\w*)
    | (?P<field>\.\w+|\.(?!\w))
    | (?P<name>[A-Za-z_]\w*)
    | (?P<mark>:=|[=(),|])
    )(?P<space>\s*)""",
    re.VERBOSE,
)
_WORD_KINDS = ("text", "number", "variable", "field", "name", "mark")
_KEYWORDS = ("if", "else", "end", "range", "with", "break", "continue", "define", "block", "template")
_SPACE = " \t\r\n"

Word = tuple[str, str]
"""Kind and text of a word in an action; of kind "of" is a field of the word before it."""


@dataclass
class TemplateNode:
    """A text, an action, or a block.

    Attributes:
        text: of a text; the keyword of a jump, which is continue or break.
        words: of an action, or of a block's head.
        body, otherwise: the nodes in a block, and those after its else.
        is_chained: the block is the `if` of an `else if`, which has no separate end.
    """

    kind: Literal["root", "text", "action", "jump", "if", "range"]
    text: str = ""
    words: list[Word] = field(default_factory=list)
    body: list[TemplateNode] = field(default_factory=list)
    otherwise: list[TemplateNode] = field(default_factory=list)
    is_chained: bool = False


_OpenBlock = tuple[TemplateNode, list[TemplateNode]]
"""A block that has not ended, and the list that the next node in it belongs to."""


def refuse(reason: str) -> NoReturn:
    """Raise the error for a template that is invalid or uses more of the language than is known."""
    raise ArtifactError(f"TEMPLATE: {reason}", "Write the Modelfile again with `kolotune modelfile`.")


def parse_go_template(template: str) -> list[TemplateNode]:
    """Return the nodes of a template.

    Raises:
        ArtifactError: it is invalid, or uses more of the language than is known.
    """
    root = TemplateNode("root")
    open_blocks: list[_OpenBlock] = [(root, root.body)]
    end, trim = 0, False
    for action in _ACTION.finditer(template):
        text = template[end : action.start()]
        if "{{" in text:
            refuse("an action is not closed")
        text = text.lstrip(_SPACE) if trim else text
        open_blocks[-1][1].append(TemplateNode("text", text.rstrip(_SPACE) if action["left"] else text))
        _add_action(action["code"].strip(), open_blocks)
        end, trim = action.end(), bool(action["right"])
    rest = template[end:]
    if "{{" in rest or len(open_blocks) > 1:
        refuse("an action or a block is not closed")
    root.body.append(TemplateNode("text", rest.lstrip(_SPACE) if trim else rest))
    return root.body


def _add_action(code: str, open_blocks: list[_OpenBlock]) -> None:
    if code.startswith("/*") and code.endswith("*/"):
        return
    head, _, rest = code.partition(" ")
    if head in ("if", "range"):
        _open_block(TemplateNode("if" if head == "if" else "range", words=_words(rest)), open_blocks)
    elif code == "end":
        if open_blocks[-1][0].kind == "root":
            refuse("an end without a block")
        # One end closes an `if` and all of its `else if`.
        while open_blocks.pop()[0].is_chained:
            pass
    elif head == "else":
        _add_else(rest.strip(), open_blocks)
    elif code in ("continue", "break"):
        if all(block.kind != "range" for block, _ in open_blocks):
            refuse(f"a {code} outside of a range")
        open_blocks[-1][1].append(TemplateNode("jump", text=code))
    elif head in _KEYWORDS:
        refuse(f"{head} is not supported")
    else:
        open_blocks[-1][1].append(TemplateNode("action", words=_words(code)))


def _open_block(node: TemplateNode, open_blocks: list[_OpenBlock]) -> None:
    open_blocks[-1][1].append(node)
    open_blocks.append((node, node.body))


def _add_else(code: str, open_blocks: list[_OpenBlock]) -> None:
    block, siblings = open_blocks[-1]
    if block.kind not in ("if", "range") or siblings is block.otherwise:
        refuse("an else without an if")
    open_blocks[-1] = (block, block.otherwise)
    if code:
        word, _, condition = code.partition(" ")
        if word != "if" or block.kind != "if":
            refuse(f"else {word} is not supported")
        _open_block(TemplateNode("if", words=_words(condition), is_chained=True), open_blocks)


def _words(code: str) -> list[Word]:
    """Split an action into words; a field that follows without a space belongs to the word before it."""
    words: list[Word] = []
    position, has_fields = 0, False
    code = code.strip()
    while position < len(code):
        match = _WORD.match(code, position)
        if match is None:
            refuse(f"{code[position : position + 20]!r} is not supported")
        kind, text = next((kind, str(match[kind])) for kind in _WORD_KINDS if match[kind])
        if kind == "field" and has_fields and not match[0][:1].isspace():
            kind = "of"
        can_have_fields = kind in ("variable", "field", "of") or (kind, text) == ("mark", ")")
        has_fields = can_have_fields and not match["space"]
        words.append((kind, text))
        position = match.end()
    return words
