"""The likely cause of a failed check, from the kinds of its defects."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from .comparison import StageCheck
from .defects import Defect, DefectKind
from .evidence import Evidence
from .gain import rounded_back
from .prompt_proof import MismatchKind


class Cause(Enum):
    """A likely cause, with its sentence; ``{artifact}`` is the artifact that fails."""

    CHATS_CHANGED = "the template, the tokenizer or the loss mask changed after the chats were prepared"
    OTHER_BASE = "this is not the base model that was trained on: its shape is the same, its weights differ"
    OTHER_ADAPTER = "this is not the adapter that training produced: it was replaced, or its matrices are mixed up"
    STOP_MISSING = "a PARAMETER stop is missing in the Modelfile, so answers don't end"
    SYSTEM_CHANGED = "the SYSTEM line was removed or changed"
    TEMPLATE_DIFFERS = (
        "the TEMPLATE writes conversations differently from the trained template (a system turn, the BOS, another turn)"
    )
    MODELFILE_EDITED = "the Modelfile was edited"
    VOCABULARY_ORDER = "the {artifact}'s vocabulary is not in the order of the trained tokenizer"
    CHAT_TEMPLATE = "the {artifact}'s chat template was changed, or llama.cpp renders it differently"
    BOS = "the {artifact}'s tokenizer adds a BOS that training did not have, or none although training had one"
    ANSWER_MERGES = "the chats were prepared with the first characters of answers in the last token of their prompts"
    COMPOSED_FORM = "the tokenizer composes accented letters (NFC), and llama.cpp does not"
    COMPATIBILITY_FORM = "the tokenizer replaces ligatures and the like (NFKC), and llama.cpp does not"
    FIRST_SPACE = "llama.cpp puts SentencePiece's space in front of texts where the trained tokenizer puts none"
    TOKENIZER = "llama.cpp does not split texts as the trained tokenizer does"
    DAMAGED_OR_TOO_COARSE = (
        "a tensor of the file is damaged, or the quantization is too coarse for this model (Q8_0 keeps more, and so "
        "does `--quantizer compensated` at the same size)"
    )
    ROUNDED_BACK = (
        "rounding takes the training's changes back, because the base model's weights lie on the grid that they are "
        "rounded to"
    )
    CONVERTER = (
        "the converter reads this model differently from transformers (is it another version?), or the file is damaged"
    )
    HEAD_MISSING = "head and embedding were untied in the config, but the head's weights are missing"
    HEAD_UNTIED = "head and embedding share their weights in the base, but differ in the merged model"
    SCALE_TOO_SMALL = "the adapter was added with too small a scale, not at all, or to a different base model"
    WRONG_SCALE = "the adapter was added with a wrong scale or orientation"


_MISMATCHES = {
    MismatchKind.TEMPLATE: Cause.CHAT_TEMPLATE,
    MismatchKind.BOS: Cause.BOS,
    MismatchKind.ANSWER_MERGES: Cause.ANSWER_MERGES,
    MismatchKind.COMPOSED_FORM: Cause.COMPOSED_FORM,
    MismatchKind.COMPATIBILITY_FORM: Cause.COMPATIBILITY_FORM,
    MismatchKind.FIRST_SPACE: Cause.FIRST_SPACE,
    MismatchKind.TOKENS: Cause.TOKENIZER,
}
_ARTIFACTS = {"merge": "merged model", "convert": "GGUF", "quantize": "quantized GGUF"}


def likely_cause(check: StageCheck, defects: Sequence[Defect], evidence: Evidence) -> Cause:
    """Return the likely cause of the defects of a check."""
    kinds = {defect.kind for defect in defects}
    if check.stage == "prepare":
        return Cause.CHATS_CHANGED
    if check.stage == "train":
        return Cause.OTHER_BASE if any(defect.facts["model"] == "base" for defect in defects) else Cause.OTHER_ADAPTER
    if check.stage == "modelfile":
        return _cause_in_modelfile(defects)
    if DefectKind.VOCABULARY_MOVED in kinds:
        return Cause.VOCABULARY_ORDER
    if DefectKind.PROMPTS_DIFFER in kinds:
        return _cause_of_mismatch(defects)
    if check.stage == "quantize" and check.name in rounded_back(evidence):
        return Cause.ROUNDED_BACK
    if check.stage == "quantize":
        return Cause.DAMAGED_OR_TOO_COARSE
    if check.stage == "convert":
        return Cause.CONVERTER
    return _cause_in_merge(check, kinds, evidence)


def describe_cause(cause: Cause, stage: str) -> str:
    """Return the sentence for a cause, without a full stop."""
    return cause.value.format(artifact=_ARTIFACTS.get(stage, ""))


def _cause_of_mismatch(defects: Sequence[Defect]) -> Cause:
    kinds = [defect.facts.get("mismatch") for defect in defects if defect.kind is DefectKind.PROMPTS_DIFFER]
    return _MISMATCHES[MismatchKind(str(kinds[0]))] if kinds[0] else Cause.CHAT_TEMPLATE


def _cause_in_modelfile(defects: Sequence[Defect]) -> Cause:
    kinds = {defect.kind for defect in defects}
    causes = {
        DefectKind.STOP_MISSING: Cause.STOP_MISSING,
        DefectKind.SYSTEM_DIFFERS: Cause.SYSTEM_CHANGED,
        DefectKind.PROMPTS_DIFFER: Cause.TEMPLATE_DIFFERS,
    }
    return next((cause for kind, cause in causes.items() if kind in kinds), Cause.MODELFILE_EDITED)


def _cause_in_merge(check: StageCheck, kinds: set[DefectKind], evidence: Evidence) -> Cause:
    if DefectKind.WEIGHTS_MISSING in kinds:
        return Cause.HEAD_MISSING
    if evidence.untied:
        return Cause.HEAD_UNTIED
    base, tuned = evidence.reference.base_loss, evidence.reference.tuned_loss
    if check.loss is not None and abs(check.loss - base) < abs(check.loss - tuned):
        return Cause.SCALE_TOO_SMALL
    return Cause.WRONG_SCALE
