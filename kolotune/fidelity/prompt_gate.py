"""Before training: will llama.cpp's server put the tokens before an answer that training puts there?

It needs no weights. The GGUF's header is known from the conversion plan, and llama.cpp's own server is asked what it
makes of a short chat with each trait; the answer is kept in the cache. Once chats are prepared, the whole prompts
of some of them are asked for, and the tokens of all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.chats.dataset.prepared import TRAITS
from kolotune.chats.reading.files import opened, read_chat
from kolotune.chats.tokens.tokenizer import TEMPLATE_FILE, TOKENIZER_FILES
from kolotune.chats.traits import ChatTrait
from kolotune.foundation import typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.files import remove
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom
from kolotune.foundation.reporter import Reporter
from kolotune.gguf import conversion_source, convert
from kolotune.gguf.model_skeleton import ModelSkeleton
from kolotune.llamacpp.prompt_server import PromptServer, SparseGguf
from kolotune.llamacpp.tokenizer_model import tokenizer_model
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS, RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context

from .prepared_prompts import PreparedPrompts, check_prepared_prompts
from .prompt_proof import MismatchKind, Outcome, Prompt, PromptResult, ask

if TYPE_CHECKING:
    from .trained_format import TrainedFormat

_VERSION = 5  # raised when the battery or the way to ask changes
_PACKAGES = ("xllamacpp", "transformers", "tokenizers", "jinja2")
_MOST_PROOFS = 32
_HELD_OUT = 16  # chats whose prompts are asked for, too
_TOLERATED = {TRAIN_TOKENS: 0.01, HELD_OUT_TOKENS: 0.0}  # share of the chats; `compare` tolerates none
_WRONG = (Outcome.DIFFERENT, Outcome.SERVER_REFUSES)
_HINTS = {
    MismatchKind.COMPOSED_FORM: "Write the chats in composed form: unicodedata.normalize('NFC', text) in Python.",
    MismatchKind.COMPATIBILITY_FORM: "Write the chats without them: unicodedata.normalize('NFKC', text) in Python.",
    MismatchKind.TEMPLATE: "Give a template that both write alike (--chat-template), or use another base model.",
}
_TRAIN_ANYWAY = "With --no-compare it is trained nevertheless."


@dataclass(frozen=True)
class PromptProof:
    """What llama.cpp's server makes of the battery, one result for each trait."""

    results: tuple[PromptResult, ...]


def check_prompts(
    context: Context, reporter: Reporter, traits: Collection[ChatTrait] | None, *, is_prepared: bool
) -> None:
    """Check that the chats' prompts will be served as they are trained; warn of prompts that the chats don't have.

    Args:
        context: of the run.
        reporter: gets the warning.
        traits: those of the chats; None while they are unknown: then nothing is wrong as long as anything is right.
        is_prepared: the run's tokenizer is that of its chats.

    Raises:
        TemplateError: they won't, and the run is to be compared.
        ToolchainError: llama.cpp's server is not installed, or the tokenizer can't be converted.
    """
    subject = _subject(context, reporter, is_prepared)
    results = _find_proof(subject, reporter).results
    trained = [result for result in results if result.outcome in (Outcome.EQUAL, *_WRONG)]
    wrong = [result for result in trained if result.outcome in _WRONG]
    if traits is None:
        used = wrong if len(wrong) == len(trained) else []
    else:
        used = [result for result in wrong if result.name in traits]
    if not used and is_prepared:
        used = [
            result
            for result in subject.ask(_held_out_prompts(context.run, context.config.objective))
            if result.outcome in _WRONG
        ]
        wrong += used
    if used and context.config.compare:
        raise _error(used)
    if is_prepared and not used:
        _check_prepared(context, reporter, subject)
    unused = [result for result in wrong if traits is not None or is_prepared]
    if unused:
        reporter.warning(f"llama.cpp's server does not write every prompt as training does: {_describe(unused)}")


def _check_prepared(context: Context, reporter: Reporter, subject: _Subject) -> None:
    """Check the tokens of all prompts of the prepared chats; `compare` refuses even one of the held-out ones."""
    reporter.doing("asking llama.cpp for the tokens of the prepared chats")
    files = [file for name in _TOLERATED if (file := context.run.prepared / name).is_file()]
    for file, prompts in zip(files, subject.check_prepared(files), strict=True):
        kind = "held-out" if file.name == HELD_OUT_TOKENS else "training"
        if prompts.asked < prompts.chats:
            reporter.note(f"llama.cpp was asked for the tokens of {prompts.asked:,} of {prompts.chats:,} {kind} chats")
        if prompts.mismatch is None:
            continue
        cause = (
            f"{prompts.different:,} of {prompts.asked:,} {kind} chats have other tokens in llama.cpp than they are "
            f"trained with: {prompts.mismatch.kind.sentence}: {prompts.mismatch}"
        )
        if context.config.compare and prompts.different > _TOLERATED[file.name] * prompts.asked:
            hint = _HINTS.get(prompts.mismatch.kind, "Change these texts, or use another base model.")
            raise TemplateError(cause, f"{hint} {_TRAIN_ANYWAY}")
        reporter.warning(cause)


def recorded_traits(run: RunFolder) -> list[ChatTrait] | None:
    """Return the traits of a run's chats; None when they are not prepared, or were by an earlier version."""
    record = read_record(run, "prepare")
    names = record.facts.get(TRAITS) if record is not None else None
    return [trait for trait in ChatTrait if trait in names] if isinstance(names, list) else None


def find_proof(context: Context, reporter: Reporter, *, is_prepared: bool) -> PromptProof:
    """Return the proof of a run's prompts, from the cache if nothing has changed; see `check_prompts`."""
    return _find_proof(_subject(context, reporter, is_prepared), reporter)


@dataclass(frozen=True)
class _Subject:
    """What is going to be served: the trained tokenizer and template, and the header of the GGUF."""

    tokenizer: Path
    skeleton: ModelSkeleton
    model: SparseGguf

    def ask(self, prompts: Callable[[TrainedFormat], list[Prompt]]) -> list[PromptResult]:
        """Return what the server makes of prompts."""
        from kolotune.chats.tokens.tokenizer import special_tokens

        from .trained_format import TrainedFormat
        from .vocabulary import vocabulary_by_id

        trained = TrainedFormat.load(self.tokenizer, self.skeleton.text(TEMPLATE_FILE))
        asked = prompts(trained)
        if not asked:
            return []
        bos = special_tokens(trained.tokenizer).get("bos_token", "")
        with PromptServer(self.model) as server:
            return list(ask(asked, server, vocabulary_by_id(trained.tokenizer), bos))

    def check_prepared(self, files: Sequence[Path]) -> list[PreparedPrompts]:
        """Return what llama.cpp makes of the prompts in each file that `prepare` wrote."""
        from kolotune.chats.tokens.tokenizer import load_tokenizer

        from .vocabulary import vocabulary_by_id

        tokenizer = load_tokenizer(self.tokenizer)
        backend, pieces = tokenizer.backend_tokenizer, vocabulary_by_id(tokenizer)
        with PromptServer(self.model) as server:
            return [check_prepared_prompts(file, backend, pieces, server.split) for file in files]


def _subject(context: Context, reporter: Reporter, is_prepared: bool) -> _Subject:
    skeleton, gguf_type = conversion_source.expected_skeleton(context, is_prepared=is_prepared)
    header = convert.expected_header(skeleton, gguf_type, context.run.log("prompts"), reporter)
    return _Subject(context.run.tokenizer if is_prepared else context.base, skeleton, tokenizer_model(header))


def _find_proof(subject: _Subject, reporter: Reporter) -> PromptProof:
    file = cache_folder("prompts") / f"{_key(subject.skeleton, subject.model)}.json"
    known = typed_storage.read_or_none(PromptProof, file)
    if known is not None:
        return known
    reporter.doing("asking llama.cpp's server for its prompts")
    proof = PromptProof(tuple(subject.ask(lambda trained: trained.battery())))
    file.parent.mkdir(parents=True, exist_ok=True)
    typed_storage.write(file, proof)
    _remove_old(file)
    return proof


def _held_out_prompts(run: RunFolder, objective: str) -> Callable[[TrainedFormat], list[Prompt]]:
    """Return what gives the prompts of the last answers of some held-out chats, or the beginnings of documents."""

    def prompts(trained: TrainedFormat) -> list[Prompt]:
        file = run.prepared / HELD_OUT_CHATS
        if not file.is_file() or not file.stat().st_size:
            return []
        if OBJECTIVES[objective].learns_from is LearnsFrom.TEXT:
            from .text_prompts import held_out_beginnings

            return held_out_beginnings(file, trained, _HELD_OUT)
        with opened(file) as (_, records):
            chats = [read_chat(file, record).chat for record in itertools.islice(records, _HELD_OUT)]
        return [trained.trained_prompt(chat, "") for chat in chats if chat is not None]

    return prompts


def _key(skeleton: ModelSkeleton, model: SparseGguf) -> str:
    """Return a hash of everything that the proof depends on."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    digest = hashlib.sha256(f"{_VERSION} {' '.join(versions)}\0".encode() + model.header)
    for name in TOKENIZER_FILES:
        if name in skeleton.files:
            digest.update(f"\0{name}\0{skeleton.file_digest(name)}".encode())
    return digest.hexdigest()[:32]


def _remove_old(newest: Path) -> None:
    older = sorted((path for path in newest.parent.iterdir() if path != newest), key=lambda path: path.stat().st_mtime)
    for path in older[: 1 - _MOST_PROOFS]:
        with suppress(OSError):
            remove(path)


def _error(wrong: list[PromptResult]) -> TemplateError:
    first = wrong[0]
    cause = f"the model would be served other prompts than it is trained on. In {_place(first)}: "
    if first.mismatch is None:
        return TemplateError(f"{cause}{first.reason}{_more(wrong)}", f"Use another base model. {_TRAIN_ANYWAY}")
    hint = _HINTS.get(first.mismatch.kind, "Use another base model.")
    cause += f"{first.mismatch.kind.sentence}: {first.mismatch}"
    return TemplateError(f"{cause}{_more(wrong)}", f"{hint} {_TRAIN_ANYWAY}")


def _more(wrong: list[PromptResult]) -> str:
    others = [result for result in wrong if result.name != wrong[0].name]
    return f" (also in {_describe(others)})" if others else ""


def _describe(results: list[PromptResult]) -> str:
    return "; ".join(dict.fromkeys(map(_place, results)))


def _place(result: PromptResult) -> str:
    return f"chats with {ChatTrait(result.name).sentence}" if result.name else "the held-out chats"
