"""Report documents: what was read and is trained on, and every document that was cut, changed or left out."""

from __future__ import annotations

from collections import Counter

from kolotune.foundation.reporter import Reporter

from .prepared import AffectedChats, Prepared

_FEW_SEQUENCES, _SHOWN_LOCATIONS = 20, 20


def report_documents(prepared: Prepared, reporter: Reporter) -> None:
    """Report the documents of a text objective."""
    text = prepared.text
    assert text is not None
    for shape, files in Counter(prepared.shapes.values()).items():
        reporter.note(f"{_count(files, 'file')}: {shape}")
    train, held_out = prepared.train, prepared.held_out
    shortest, median, longest = prepared.lengths
    reporter.note(
        f"{_count(train.chats, 'document')} to train on, {held_out.chats:,} held out; {train.tokens:,} tokens, "
        f"{train.labelled:,} of them predicted; packed into {_count(text.sequences, 'sequence')}, in which no document "
        f"sees another; pieces have {shortest:,} to {longest:,} tokens, median {median:,}"
    )
    if text.cut:
        reporter.note(
            f"{_count(text.cut, 'document')} longer than --max-seq-length became {text.pieces:,} pieces; "
            "no token was left out"
        )
    if prepared.train.chats and not held_out.chats:
        reporter.warning(
            "no document is held out: there are few; give some with --eval-data, or --eval-split a larger share"
        )
    if 0 < text.sequences < _FEW_SEQUENCES:
        reporter.warning(
            f"{_count(text.sequences, 'packed sequence')} of a step each are few: a lower --max-seq-length makes more "
            "steps of the same text"
        )
    for affected, sentence in (
        (prepared.duplicates, "exact copies of other documents were left out"),
        (prepared.in_both, "held-out documents are also in the training data and were left out of the held-out ones"),
    ):
        if affected.count:
            reporter.warning(f"{affected.count:,} {sentence}")
            _report_locations(affected, reporter)
    if prepared.as_served.count:
        reporter.note(
            f"{_count(prepared.as_served.count, 'document')} with other tokens in llama.cpp than in the base's own "
            "tokenizer (accents apart from their letters, or spaces after special tokens): llama.cpp's are trained on"
        )
        _report_locations(prepared.as_served, reporter)
    for finding in prepared.findings:
        reporter.warning(finding.text)
        where = finding.locations
        _report_locations(AffectedChats(len(where), where[:_SHOWN_LOCATIONS]), reporter)
    if prepared.not_compared:
        reporter.note(
            f"{prepared.not_compared:,} documents were not searched for near-duplicates; `kolotune check` searches all"
        )
    for key, count in prepared.unread.most_common():
        reporter.note(f"{key!r} is filled in {_count(count, 'record')} and not read")


def _report_locations(affected: AffectedChats, reporter: Reporter) -> None:
    for location in affected.locations:
        reporter.note(f"  {location}")
    if affected.count > len(affected.locations):
        reporter.note(f"  … and {affected.count - len(affected.locations)} more")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
