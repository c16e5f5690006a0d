"""The verb `check`: validate chats and show what is trained on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import DataError
from kolotune.run_folder.layout import TRAIN_TOKENS

from . import hints
from .options import reporter, resolve_flags, with_options
from .parameters import ConfigFile, Data, Json

_SHOWN_PROBLEMS = 50
_SHOWN_PIECES, _SHOWN_TOKENS = 3, 80  # of a packed sequence, and of each piece


@with_options()
def check(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """Validate chats and show problems with their lines."""
    from kolotune.base_models.new_tokens import resolve_base
    from kolotune.chats.dataset.prepare import prepare_chats
    from kolotune.chats.dataset.prepared import hint_against, nothing_to_train_on
    from kolotune.chats.dataset.row_store import first_encoded, first_rejected
    from kolotune.chats.reading.problem_report import problem_lines
    from kolotune.stages import prepare

    say = reporter(json)
    resolved = resolve_flags(flags, data, config)
    if not resolved.train_data:
        raise hints.no_chats("check")
    hints.require_files(resolved)
    base = resolve_base(resolved, say)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_chats(resolved, base, Path(folder), compared=None)
        tokens = Path(folder, TRAIN_TOKENS)
        first, rejected = (first_encoded(tokens), first_rejected(tokens)) if prepared.train.chats else ([], 0)
    problems, prepared.problems = prepared.problems, []
    prepare.report_prepared(prepared, say)
    if first:
        if prepared.text is not None:
            several = f", of {len(first)} pieces" if len(first) > 1 else ""
            say.note(f"The first packed sequence{several}; the loss covers what is between ⟦ and ⟧:")
            first = [(ids[:_SHOWN_TOKENS], labels[:_SHOWN_TOKENS]) for ids, labels in first[:_SHOWN_PIECES]]
        else:
            several = f", in {len(first)} sequences" if len(first) > 1 else ""
            say.note(f"The first chat as it is trained on{several}; the loss covers what is between ⟦ and ⟧:")
        for number, (ids, labels) in enumerate(first):
            if rejected:
                say.note("rejected:" if number < rejected else "preferred:")
            say.note(_with_marks(ids, labels, prepared.tokenizer))
    prepared.problems = problems
    lines = problem_lines(problems)
    for line in lines[:_SHOWN_PROBLEMS]:
        say.warning(line)
    if problems:
        hidden = len(lines) - _SHOWN_PROBLEMS
        cause = f"{_count(len(problems), 'problem')} in the {prepared.noun}s"
        raise DataError(cause + (f" ({hidden} kinds not shown)" if hidden > 0 else ""), hint_against(prepared))
    if not prepared.train.chats:
        raise nothing_to_train_on(prepared)
    say.success(f"No problems found in {_count(prepared.train.chats + prepared.held_out.chats, prepared.noun)}")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _with_marks(ids: list[int], labels: list[bool], tokenizer: Any) -> str:
    """Return the chat's text with ⟦ and ⟧ around the parts that are trained on."""
    parts: list[str] = []
    run: list[int] = []
    state = False
    for token, labelled in [*zip(ids, labels, strict=True), (0, None)]:
        if labelled is not state:
            text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            parts.append(f"⟦{text}⟧" if state else text)
            run, state = [], bool(labelled)
        run.append(token)
    return "".join(parts)
