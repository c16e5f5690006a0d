"""SentencePiece's own file of a vocabulary, ``tokenizer.model``: its order of merges; and the file where none is.

llama.cpp joins letters by the scores in this file, which its converter needs. Where a folder has no tokenizer.json,
transformers 5 joins them in the order of their ids instead, whatever the scores say; and what transformers 5 saves has
no tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SENTENCEPIECE_FILE = "tokenizer.model"
_BYTES = 256
_USUAL_UNKNOWN = "<unk>"  # some files don't name it, since each unknown letter is bytes
_BPE = 2  # ModelProto.TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type


def merges_by_score(file: Path, merges: Callable[[], Sequence[Sequence[str]]]) -> list[tuple[str, str]] | None:
    """Return a tokenizer's merges in the order of the scores in a SentencePiece file, best first.

    Among merges of one score the longest left part comes first: it stands leftmost, which is SentencePiece's rule.

    Args:
        file: The file, which need not exist.
        merges: Returns the merges; called only if the scores have another order than the ids.

    Returns:
        The merges; None if they have this order, or the file is none of SentencePiece's with pairs that are merged.
    """
    model = _read(file)
    if model is None or model.trainer_spec.model_type != _BPE:
        return None
    if _is_falling([piece.score for piece in model.pieces if piece.type == _NORMAL]):
        return None
    score_of = {piece.piece: piece.score for piece in model.pieces}
    known = merges()
    try:
        scores = [score_of[left + right] for left, right in known]
    except KeyError:  # the files are not of one vocabulary
        return None
    if _is_falling(scores):
        return None
    by_score = sorted(zip(scores, known, strict=True), key=lambda each: (-each[0], -len(each[1][0]), -len(each[1][1])))
    return [(left, right) for _, (left, right) in by_score]


def _is_falling(scores: Sequence[float]) -> bool:
    return all(first >= second for first, second in pairwise(scores))


def sentencepiece_model(tokenizer_file: Path) -> bytes | None:
    """Return what tokenizer.model has to be for a vocabulary in a tokenizer.json.

    The score of a piece says how early its first merge comes.

    Returns:
        The file's bytes; None if the vocabulary is not one of SentencePiece's with pairs that are merged, and bytes
        for unknown letters.
    """
    try:
        description = typed_storage.read_object(tokenizer_file)
    except (OSError, typed_storage.StorageError):
        return None
    match description.get("model"):
        case {"type": "BPE", "byte_fallback": True, "vocab": dict(vocab), "merges": [*merges], **rest}:
            unknown = str(rest.get("unk_token") or _USUAL_UNKNOWN)
        case _:
            return None
    numbers = {piece: number for piece, number in vocab.items() if isinstance(number, int)}
    if not all(f"<0x{value:02X}>" in numbers for value in range(_BYTES)) or unknown not in numbers:
        return None
    model = _model(numbers, [_pair(merge) for merge in merges], _types(description, unknown))
    return bytes(model.SerializeToString())


def _pair(merge: object) -> str:
    """Return what a merge makes; older files write its parts as one text."""
    return "".join(map(str, merge)) if isinstance(merge, list) else str(merge).replace(" ", "", 1)


def _types(description: JsonObject, unknown: str) -> dict[str, int]:
    """Return the types of the tokens that are no plain pieces."""
    types = {f"<0x{value:02X}>": _BYTE for value in range(_BYTES)}
    added = description.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        match token:
            case {"content": str(content), "special": bool(is_special)}:
                types[content] = _CONTROL if is_special else _USER_DEFINED
    return types | {unknown: _UNKNOWN}


def _model(numbers: Mapping[str, int], merged: Sequence[str], types: Mapping[str, int]) -> ModelProto:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    ranks: dict[str, int] = {}
    for rank, piece in enumerate(merged):
        ranks.setdefault(piece, rank)
    pieces = {number: piece for piece, number in numbers.items()}
    model = ModelProto()
    model.trainer_spec.model_type = _BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for number in range(max(pieces) + 1):
        text = pieces.get(number, f"[PAD{number}]")
        kind = types.get(text, _NORMAL) if number in pieces else _UNUSED
        score = -float(ranks.get(text, len(merged))) if kind == _NORMAL else 0.0
        model.pieces.add(piece=text, score=score, type=kind)
    return model


def _read(file: Path) -> ModelProto | None:
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError):  # Llama 3's file of this name is another format
        return None
    return model
