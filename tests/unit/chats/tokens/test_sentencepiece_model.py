"""tokenizer.model: tokens by its scores, and the file where a base has none, as llama.cpp reads both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.masking import CHATML_SPECIAL, byte_level, metaspace
from support.tokenizer_gguf import scored_gguf_of

from kolotune.chats.tokens.sentencepiece_model import SENTENCEPIECE_FILE, merges_by_score, sentencepiece_model
from kolotune.chats.tokens.served_tokenizer import ServedChange
from kolotune.chats.tokens.tokenizer import load_served_tokenizer, trained_tokenizer
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

SETTINGS = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "How is the weather today?",
    "  two spaces before, two behind  ",
    "    def four_spaces(more):\n        return more     # and five",
    "\ttabs\tand\n\n\nlines",
    "letters that are not there: Zürich, 日本語",
    " ",
    "",
    "the the the  the   the    the",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.model alone, made by SentencePiece; its runs of spaces come early, with a low score.

    So they stand in the vocabularies of Mistral.
    """
    folder = tmp_path_factory.mktemp("real")
    text = folder / "text.txt"
    text.write_text("\n".join([Path(__file__).read_text(encoding="utf-8"), *TEXTS[:3]] * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700, byte_fallback=True,
        character_coverage=1.0, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2, train_extremely_large_corpus=False, hard_vocab_limit=False,
    )  # fmt: skip
    model = ModelProto()
    model.ParseFromString((folder / SENTENCEPIECE_FILE).read_bytes())
    first = next(number for number, piece in enumerate(model.pieces) if piece.type == piece.NORMAL)
    known = {piece.piece for piece in model.pieces}
    runs = [spaces for length in range(2, 9) if (spaces := "\u2581" * length) not in known]
    pieces = list(model.pieces)
    del model.pieces[:]
    model.pieces.extend(pieces[:first])
    for spaces in runs:
        model.pieces.add(piece=spaces, score=-1e9)
    model.pieces.extend(pieces[first:])
    for piece in model.pieces:
        if set(piece.piece) == {"\u2581"}:
            piece.score = -1e9
    (folder / SENTENCEPIECE_FILE).write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(real: Path) -> Iterator[PromptServer]:
    with PromptServer(tokenizer_model(scored_gguf_of(real / SENTENCEPIECE_FILE, real / "small.gguf"))) as server:
        yield server


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_alone_is_read_by_its_scores(text: str, real: Path, server: PromptServer) -> None:
    """transformers merges in the order of the ids, which puts runs of spaces first."""
    tokenizer, replaced = load_served_tokenizer(real)
    assert replaced is not None and replaced.change is ServedChange.SCORED_MERGES
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == server.tokens(text)
    own = sentencepiece.SentencePieceProcessor(model_file=str(real / SENTENCEPIECE_FILE))
    assert ids == (own.encode(text) if text else [])


def test_transformers_would_read_it_otherwise(real: Path, server: PromptServer) -> None:
    own = transformers.AutoTokenizer.from_pretrained(real)
    assert any(own(text, add_special_tokens=False)["input_ids"] != server.tokens(text) for text in TEXTS)


def test_merges_that_follow_the_scores_are_kept(real: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_served_tokenizer(real)
    tokenizer.save_pretrained(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges_by_score(real / SENTENCEPIECE_FILE, lambda: merges) is None
    in_other_order = [merges[-1], *merges[:-1]]
    assert merges_by_score(real / SENTENCEPIECE_FILE, lambda: in_other_order) == [tuple(merge) for merge in merges]
    assert merges_by_score(real / SENTENCEPIECE_FILE, lambda: [*merges, ["not", "there"]]) is None


def test_other_files_of_this_name_say_nothing(tmp_path: Path) -> None:
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(b"IQ== 0\nIg== 1\n")  # as Llama 3's is written
    assert merges_by_score(tmp_path / SENTENCEPIECE_FILE, lambda: [["a", "b"]]) is None
    assert merges_by_score(tmp_path / "absent", lambda: [["a", "b"]]) is None


@pytest.fixture(scope="module")
def saved(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as transformers saves it: without a tokenizer.model."""
    folder = tmp_path_factory.mktemp("saved")
    load_served_tokenizer(real)[0].save_pretrained(folder)
    assert not (folder / SENTENCEPIECE_FILE).exists()
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_a_missing_file_is_written(text: str, saved: Path, tmp_path: Path) -> None:
    content = trained_tokenizer(saved, "{{ messages }}", adds_bos=False)[SENTENCEPIECE_FILE]
    assert isinstance(content, bytes)
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(content)
    tokenizer, _ = load_served_tokenizer(saved)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / SENTENCEPIECE_FILE))
    assert ids == (own.encode(text) if text else [])
    with PromptServer(tokenizer_model(scored_gguf_of(tmp_path / SENTENCEPIECE_FILE, tmp_path / "v.gguf"))) as server:
        assert ids == server.tokens(text)


def test_the_types_of_tokens_are_written(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    value = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    size = len(value["model"]["vocab"])
    value["added_tokens"] += [
        {"id": size + 1, "content": "<|turn|>", "special": True},
        {"id": size + 2, "content": "<think>", "special": False},
    ]
    value["model"]["vocab"] |= {"<|turn|>": size + 1, "<think>": size + 2}
    file.write_text(json.dumps(value), encoding="utf-8")
    model = ModelProto()
    model.ParseFromString(sentencepiece_model(file) or b"")
    pieces = {piece.piece: piece for piece in model.pieces}
    assert model.pieces[size].type == pieces["<unk>"].UNUSED  # an id that is missing
    assert pieces["<|turn|>"].type == pieces["<unk>"].CONTROL
    assert pieces["<think>"].type == pieces["<unk>"].USER_DEFINED
    assert pieces["<0x0A>"].type == pieces["<unk>"].BYTE
    assert pieces["<unk>"].type == pieces["<unk>"].UNKNOWN


@pytest.mark.parametrize("kind", ["letters", "no bytes", "absent"])
def test_other_vocabularies_get_no_file(kind: str, tmp_path: Path) -> None:
    if kind != "absent":
        tokenizer = byte_level(CHATML_SPECIAL) if kind == "letters" else metaspace(CHATML_SPECIAL)
        tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert sentencepiece_model(tmp_path / "tokenizer.json") is None
