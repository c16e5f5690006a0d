"""A template signature: what a template writes around the texts of all chats whose turns have the same roles.

Example: for the roles user and assistant, a ChatML template has the pieces ``<|im_start|>user\\n``,
``<|im_end|>\\n<|im_start|>assistant\\n`` and ``<|im_end|>\\n``. The texts of turn 0 and turn 1 go between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PiecePosition = tuple[int, int]
"""The number of a piece, and an offset in it."""


@dataclass(frozen=True)
class TemplateSignature:
    """What a template writes, apart from the texts.

    Attributes:
        pieces: The text before, between and behind the contents; one more than `contents`.
        contents: Between two pieces, the number of the turn whose text goes there, and whether it is trimmed.
    """

    pieces: list[str]
    contents: list[tuple[int, bool]]

    def fill(self, texts: Sequence[str]) -> tuple[str, list[int]]:
        """Return the rendering with these texts of the turns, and where each piece starts in it."""
        out, offset, starts = [self.pieces[0]], len(self.pieces[0]), [0]
        for (turn, trimmed), piece in zip(self.contents, self.pieces[1:], strict=True):
            text = texts[turn].strip() if trimmed else texts[turn]
            out += (text, piece)
            offset += len(text)
            starts.append(offset)
            offset += len(piece)
        return "".join(out), starts

    def starts_with(self, prefix: TemplateSignature) -> bool:
        """Whether a rendering starts with that of `prefix`, whatever the texts are."""
        last = len(prefix.contents)
        return (
            self.contents[:last] == prefix.contents
            and self.pieces[:last] == prefix.pieces[:last]
            and self.pieces[last].startswith(prefix.pieces[last])
        )

    def until(self, number: int, offset: int) -> TemplateSignature:
        """Return what is before an offset in the piece of this number."""
        return TemplateSignature([*self.pieces[:number], self.pieces[number][:offset]], self.contents[:number])

    def position(self, starts: Sequence[int], offset: int) -> PiecePosition | None:
        """Return the piece that contains an offset of the rendering, or ends there; None inside a text."""
        for number, (start, piece) in enumerate(zip(starts, self.pieces, strict=True)):
            if start <= offset <= start + len(piece):
                return number, offset - start
        return None
