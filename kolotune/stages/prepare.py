"""prepare: chats → token ids with loss mask, and the tokenizer with its frozen template."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES, trained_tokenizer, writes_bos
from kolotune.fidelity.general_chats import GeneralChatsTask, make_general_chats, prompts_sha256
from kolotune.foundation.config import Config, stage_options
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.files import replacing
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import GENERAL_CHATS
from kolotune.run_folder.stage import Context
from kolotune.weights.model_config import read_model_config

if TYPE_CHECKING:
    from kolotune.chats.dataset.prepared import AffectedChats, Prepared

NAME = "prepare"
DOING = "reading, checking and encoding the chats"
BASE_INPUT = "the base model"  # whose answers are mixed in
TEMPLATE_INPUT = "the chat template"  # that the user gives in place of the base's
_SHOWN_LOCATIONS = 20
_SHOWN_KEYS = 8
_FEW = 20
_FEW_HINT = "the model will repeat them; a style takes about 50, a task some hundreds"
# What happened to chats that are not trained on as they are, as a sentence after their number; by the fact's name.
CHANGED_CHATS = {
    "duplicates": "exact copies of other chats were left out",
    "in_both_parts": "held-out chats are also in the training data and were left out of the held-out chats",
    "shortened": "chats are too long: {turns_left_out} whole turns at their ends were left out",
    "too_long": "chats were left out: not even the first answer that is trained on fits --max-seq-length",
    "undecided": "pairs were left out: chosen and rejected are the same",
    "excluded": "records were left out, as their own weights or flags, or --train-on, say",
    "untrained_turns": "answers are not trained on, as their own weights or flags, or --train-on, say",
    "weighted_turns": "answers count less in the loss, as their own weights say: from {lowest_weight:g} to "
    "{highest_weight:g}",
    "special_tokens_in_content": "chats have special tokens in their text; they are trained as plain text, "
    "and can't be served with the same ids",
    "reduced_tools": "chats have tool definitions that say more than Ollama hands to a template "
    "({lost}); they are trained without that",
}
# The same of documents.
CHANGED_DOCUMENTS = {
    "duplicates": "exact copies of other documents were left out",
    "in_both_parts": "held-out documents are also in the training data and were left out of the held-out ones",
    "cut_documents": "documents longer than a sequence became {pieces} pieces; no token was left out",
}
# How answers are trained behind the prompts that they are served with, where that is not obvious.
_APART = "chats are trained with a sequence for each answer: "
SERVED_CHATS = {
    "as_written": "chats have letters with separate accents or the like (Unicode that is not in composed form, NFC): "
    "they are trained as they are written, as llama.cpp reads them; the base's own tokenizer would compose them",
    "more_spaces": "chats are trained with the spaces that llama.cpp puts after special tokens; the base's own "
    "tokenizer puts fewer",
    "scored_merges": "chats are trained with the merges of tokenizer.model, by their scores, as llama.cpp reads it; "
    "transformers 5 makes them in another order",
    "pairs": "chats are pairs of a preferred and a rejected answer to one prompt",
    "undesirable": "chats have an answer that is labelled as bad",
    "apart_opening": _APART + "the template opens a reply with something that it writes before no finished answer",
    "apart_history": _APART + "the template writes earlier answers differently once later turns follow",
    "apart_boundary": _APART + "the last token of a prompt would merge with the answer",
    "masked_thoughts": "answers have no thought: the empty one before them is not trained on; "
    "--empty-thoughts learn trains on it",
    "dropped_thoughts": "thoughts are left out of later prompts by the template; each is trained on before its answer, "
    "if that is trained on",
    "renamed_calls": "chats got short ids of tool calls, the same in call and result: the template refuses theirs",
    "general_chats": "chats are the base model's own answers to general prompts (--keep-general)",
    "split_chats": "chats became {split_exchanges}, one of each exchange (--split-thoughts)",
}
_SPLIT_HINT = "; --split-thoughts makes one chat of each exchange"


def options(config: Config) -> JsonObject:
    general: JsonObject = {"general_prompts": prompts_sha256()} if config.keep_general else {}
    return stage_options(config, NAME) | general


def inputs(context: Context) -> dict[str, Path]:
    # Numbered: two files may have one name, and their order is the chats' order.
    files = {f"training data {number} ({path.name})": path for number, path in enumerate(context.config.train_data, 1)}
    files |= {f"held-out data {number} ({path.name})": path for number, path in enumerate(context.config.eval_data, 1)}
    if context.config.chat_template is not None:
        files[TEMPLATE_INPUT] = context.config.chat_template
    if context.config.keep_general:
        files[BASE_INPUT] = context.base
    return files | {f"the base model's {name}": context.base / name for name in TOKENIZER_FILES}


def outputs(context: Context) -> list[Path]:
    return [context.run.prepared]


def packages() -> Sequence[str]:
    return ("tokenizers", "transformers", "jinja2")


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that data was given, and that the model can read chats of the requested length."""
    del reporter
    if not context.config.train_data:
        raise ConfigError("no training data was given", "Name a file: kolotune run chats.jsonl")
    limit = read_model_config(context.base).max_positions
    if limit is not None and context.config.max_seq_length > limit:
        raise ConfigError(
            f"max-seq-length {context.config.max_seq_length}: the base model reads at most {limit} tokens",
            f"Give --max-seq-length {limit} or less.",
        )


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Write the tokens and the tokenizer; return the counts, see `Prepared.summary`."""
    from kolotune.chats.dataset.prepare import prepare_chats
    from kolotune.chats.dataset.prepared import require_good

    with replacing(context.run.prepared) as partial:
        partial.mkdir(parents=True)
        keep = context.config.keep_general
        mix = functools.partial(_write_general, context, partial, reporter) if keep else None
        prepared = prepare_chats(context.config, context.base, partial, write_general=mix)
        require_good(prepared, context.config.skip_bad)
        report_prepared(prepared, reporter)
        if not mix:
            _write_tokenizer(prepared, context.base, partial / "tokenizer")
    return prepared.summary()


def _write_general(context: Context, folder: Path, reporter: Reporter, prepared: Prepared, to_train: int) -> None:
    """Have the base answer general prompts, with the tokenizer that is trained; see `prepare_chats`."""
    tokenizer = folder / "tokenizer"
    _write_tokenizer(prepared, context.base, tokenizer)
    task = GeneralChatsTask(
        base=str(context.base),
        base_sha256=context.hasher.of(context.base),
        tokenizer=str(tokenizer),
        tokenizer_sha256=context.hasher.of(tokenizer),
        count=math.ceil(to_train * context.config.keep_general / 100),
        file=str(folder / GENERAL_CHATS),
    )
    make_general_chats(task, context.run.log(NAME), reporter)


def noun_of(facts: Mapping[str, object]) -> str:
    """Return what a record of a run is, by the facts of this stage: "chat" or "document"."""
    return "document" if "packed_sequences" in facts else "chat"


def report_prepared(prepared: Prepared, reporter: Reporter) -> None:
    """Report what was read, what is trained on, and every chat that was changed or left out."""
    from kolotune.chats.dataset.text_report import report_documents
    from kolotune.chats.reading.problem_report import affected_records, problem_lines

    if prepared.text is not None:
        report_documents(prepared, reporter)
    else:
        _report_chats(prepared, reporter)
    if prepared.problems:
        reporter.warning(f"{affected_records(prepared.problems)} bad {prepared.noun}s were left out:")
        for line in problem_lines(prepared.problems):
            reporter.note(line)


def _report_chats(prepared: Prepared, reporter: Reporter) -> None:
    from kolotune.chats.dataset.prepared import AffectedChats

    for name, shape in prepared.shapes.items():
        reporter.note(f"{name}: {shape}")
    facts = prepared.summary()
    reporter.note(
        f"{facts['chats']} chats to train on, {facts['held_out_chats']} held out; {facts['tokens']} tokens, "
        f"{facts['labelled_tokens']} of them in answers; chats have {facts['shortest']} to {facts['longest']} tokens, "
        f"median {facts['median']}"
    )
    locations = {
        "duplicates": prepared.duplicates,
        "in_both_parts": prepared.in_both,
        "shortened": prepared.shortened,
        "too_long": prepared.too_long,
        "undecided": prepared.undecided,
        "as_written": prepared.as_served,
    }
    _report_reading(prepared, reporter)
    for name, sentence in CHANGED_CHATS.items():
        if facts[name]:
            reporter.warning(f"{facts[name]} {sentence.format(**facts, lost=_lost_keys(prepared))}")
            _report_locations(locations.get(name, AffectedChats()), reporter)
    for name, sentence in SERVED_CHATS.items():
        if facts[name]:
            splits = name == "dropped_thoughts" and not prepared.has_preferences
            reporter.note(f"{facts[name]} {sentence.format(**facts)}{_SPLIT_HINT if splits else ''}")
            _report_locations(locations.get(name, AffectedChats()), reporter)
    if prepared.rated_alike and prepared.train.chats:
        rated, other = ("bad", "good") if prepared.undesirable else ("good", "bad")
        reporter.warning(
            f"all answers are labelled as {rated}: kto learns from the difference; add answers that are {other}"
        )
    if prepared.template.switches:
        _report_switches(prepared, reporter)
    for finding in prepared.findings:
        reporter.warning(finding.text)
        _report_locations(AffectedChats(len(finding.locations), finding.locations[:_SHOWN_LOCATIONS]), reporter)
    if prepared.not_compared:
        reporter.note(
            f"{prepared.not_compared} chats were not searched for near-duplicates; `kolotune check` searches all"
        )


def _lost_keys(prepared: Prepared) -> str:
    from kolotune.chats.reading.printable import printable

    keys = sorted(prepared.lost_tool_keys)
    shown = ", ".join([printable(key, 30) for key in keys[:_SHOWN_KEYS]])
    return f"{shown} and {len(keys) - _SHOWN_KEYS} others" if len(keys) > _SHOWN_KEYS else shown


def _report_reading(prepared: Prepared, reporter: Reporter) -> None:
    """Report each key that is filled and not read, each change to the order of turns, and a small number of chats."""
    own = prepared.train.chats - prepared.general
    if 0 < own < _FEW:
        reporter.warning(f"{own} {'chat is' if own == 1 else 'chats are'} few: {_FEW_HINT}")
    for key, count in prepared.unread.most_common():
        _report_unread(key, count, reporter, has_preferences=prepared.has_preferences)
    for key in prepared.absent_keys:
        reporter.warning(f"ignore-keys: no record has the key {key!r}")
    for text, count in prepared.marked_answers.items():
        answers = "1 answer is" if count == 1 else f"{count:,} answers are"
        reporter.warning(f"{answers} {text!r}, as programs write for an empty cell; leave those chats out if so")
    for fix, count in prepared.fixes.items():
        reporter.warning(f"{count} {fix}")


def _report_unread(key: str, count: int, reporter: Reporter, *, has_preferences: bool) -> None:
    from kolotune.chats.reading.record_keys import LABELS, METADATA, PREFERRED, REJECTED_BESIDE, canonical
    from kolotune.chats.reading.shapes import TURN_PREFIX

    name = key.removeprefix(TURN_PREFIX)
    records = f"{'turns of ' if name != key else ''}{count:,} record{'' if count == 1 else 's'}"
    sentence = f"{name!r} is filled in {records} and not read"
    if canonical(name) in METADATA and key != f"{TURN_PREFIX}name":  # who speaks is more than a description
        reporter.note(f"{sentence}; it seems to describe the record")
    elif canonical(name) in (*PREFERRED, *PREFERRED.values(), *REJECTED_BESIDE, *LABELS) and not has_preferences:
        reporter.warning(f"{sentence}; --objective dpo or kto learns from it, --ignore-keys {name} confirms that")
    elif name != key:
        reporter.warning(f"{sentence}; --ignore-keys {name} confirms that")
    else:
        reporter.warning(f"{sentence}; --map context={name} reads it, --ignore-keys {name} confirms that")


def _report_switches(prepared: Prepared, reporter: Reporter) -> None:
    """Report how often each side of the template's switches is trained, and a side that is not."""
    names, on, off = " and ".join(prepared.template.switches), prepared.thinking[True], prepared.thinking[False]
    reporter.note(f"{names}: on for {on} answers with reasoning, off for {off} without")
    if not on or not off:
        reporter.warning(
            f"no answer is trained with {names} {'off' if on else 'on'}: the model answers there as its base would; "
            f"add answers {'without' if on else 'with'} reasoning, or omit --template-switch"
        )


def _report_locations(affected: AffectedChats, reporter: Reporter) -> None:
    for location in affected.locations:
        reporter.note(f"  {location}")
    if affected.count > len(affected.locations) > 0:
        reporter.note(f"  … and {affected.count - len(affected.locations)} more")


def _write_tokenizer(prepared: Prepared, base: Path, folder: Path) -> None:
    """Write the tokenizer as it is trained with; see `trained_tokenizer`."""
    folder.mkdir()
    adds_bos = writes_bos(prepared.template, prepared.jinja)
    for name, content in trained_tokenizer(base, prepared.jinja, adds_bos=adds_bos).items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
