"""A loaded tokenizer reads texts as llama.cpp does."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.masking import CHATML_SPECIAL, byte_level, metaspace
from support.small_tokenizer import CHATML
from support.tokenizer_gguf import gguf_of, sentencepiece_gguf_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from kolotune.chats.tokens.served_tokenizer import ServedChange, read_as_served
from kolotune.chats.tokens.tokenizer import load_served_tokenizer
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

NO_FILE = Path()
DECOMPOSED = [
    "Zu\u0308rich",
    unicodedata.normalize("NFD", "Tiếng Việt có dấu"),
    unicodedata.normalize("NFD", "안녕하세요"),
    "\u1100\u1161\u11a8",  # Hangul, letter by letter
    "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",  # Arabic with vowel marks, which have an order of their own
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "\u0915\u093c and \u0958",  # a letter that no composed form has
    "\u212b and \u2126, \u00e9 and e\u0301",  # signs whose composed form is another character
    "e\u0301\u0323 e\u0323\u0301",
    "<|im_start|>u\u0308<|im_end|>",
]
SPACED = [
    "Hello and some",
    "  some  spaces ",
    "\n  a\n",
    " ",
    "",
    "  ",
    "system.",
    "<|im_end|>  some",
    " <|im_start|> some",
]


def copied(backend: Tokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer.from_str(backend.to_str())
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


@pytest.fixture(scope="module")
def bytes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    path = tmp_path_factory.mktemp("bytes") / "small.gguf"
    with PromptServer(tokenizer_model(gguf_of(byte_level(CHATML_SPECIAL), path, CHATML, adds_bos=False))) as server:
        yield server


@pytest.fixture(scope="module")
def spaces_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    path = tmp_path_factory.mktemp("spaces") / "small.gguf"
    with PromptServer(tokenizer_model(sentencepiece_gguf_of(metaspace(CHATML_SPECIAL), path))) as server:
        yield server


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("text", DECOMPOSED)
def test_letters_are_read_as_they_are_written(form: str, text: str, bytes_server: PromptServer) -> None:
    own = getattr(normalizers, form)()
    backend = copied(byte_level(CHATML_SPECIAL).backend_tokenizer, normalizers.Sequence([own]))
    before, replaced = backend.encode(text, add_special_tokens=False).ids, read_as_served(backend, NO_FILE)
    assert replaced is not None and replaced.change is ServedChange.AS_WRITTEN
    after = backend.encode(text, add_special_tokens=False).ids
    assert after == bytes_server.tokens(text)
    assert replaced.affects([text]) == replaced.affects(["", text]) == (before != after)
    assert backend.decode(after, skip_special_tokens=False) == text


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("text", SPACED)
def test_spaces_are_those_of_llama_cpp(scheme: str, text: str, spaces_server: PromptServer) -> None:
    backend = copied(metaspace(CHATML_SPECIAL, scheme=scheme).backend_tokenizer)
    replaced = read_as_served(backend, NO_FILE)
    assert replaced is not None and replaced.change is ServedChange.MORE_SPACES and replaced.affects([text])
    turns = f"<|im_start|>{text}<|im_end|>{text}"
    assert backend.encode(turns, add_special_tokens=False).ids == spaces_server.tokens(turns)


def test_nothing_is_changed_that_is_not_known() -> None:
    letters, spaces = byte_level(CHATML_SPECIAL).backend_tokenizer, metaspace(CHATML_SPECIAL).backend_tokenizer
    never = metaspace(CHATML_SPECIAL, scheme="never").backend_tokenizer
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Tokenizer(models.WordLevel({"a": 0}, "a"))
    words.normalizer = normalizers.NFC()
    split = copied(spaces)
    split.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    for backend in (
        copied(letters), copied(letters, lower), copied(never), copied(spaces, normalizers.NFKC()), words, split,
    ):  # fmt: skip
        described = backend.to_str()
        assert read_as_served(backend, NO_FILE) is None
        assert backend.to_str() == described


def test_plain_texts_are_not_affected() -> None:
    replaced = read_as_served(copied(byte_level(CHATML_SPECIAL).backend_tokenizer, normalizers.NFC()), NO_FILE)
    assert replaced is not None and not replaced.affects(["Hello", "Zürich", "日本語", "안녕"])


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("in_file", [True, False])
def test_whatever_class_loads_it(name: str, in_file: bool, tmp_path: Path) -> None:
    """Qwen2Tokenizer composes letters although the file says nothing of it."""
    backend = copied(byte_level(CHATML_SPECIAL).backend_tokenizer, normalizers.NFC() if in_file else None)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": name, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer, replaced = load_served_tokenizer(tmp_path)
    assert (replaced is not None) is (in_file or name.startswith("Qwen2"))
    assert tokenizer.decode(tokenizer("e\u0301", add_special_tokens=False)["input_ids"]) == "e\u0301"


def test_the_class_of_llama_2_has_spaces_like_llama_cpp(tmp_path: Path, spaces_server: PromptServer) -> None:
    """It has its own ids of added tokens, so the texts of tokens are compared."""
    vocabulary = copied(metaspace(CHATML_SPECIAL).backend_tokenizer)
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer, replaced = load_served_tokenizer(tmp_path)
    assert replaced is not None and replaced.change is ServedChange.MORE_SPACES
    text = "<|im_start|>  some<|im_end|>Hello"
    expected = [vocabulary.id_to_token(index) for index in spaces_server.tokens(text)]
    assert tokenizer.tokenize(text) == expected
