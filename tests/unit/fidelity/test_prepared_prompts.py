"""The tokens of prepared prompts, as llama.cpp splits their texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.masking import CHATML_SPECIAL, byte_level, metaspace
from support.small_tokenizer import CHATML
from support.tokenizer_gguf import gguf_of, sentencepiece_gguf_of
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from kolotune.fidelity.prepared_prompts import PreparedPrompts, check_prepared_prompts
from kolotune.fidelity.prompt_proof import MismatchKind
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

ANSWER = "Hello"
SPLIT_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
"""What many tokenizers do with numbers, and GPT-2's does not."""


def prompt(*questions: str) -> str:
    """Return turns of users with the same answer to each but the last, whose answer is opened."""
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    return f"{ANSWER}<|im_end|>\n".join(map(turn, questions))


def write(path: Path, backend: Tokenizer, prompts: Sequence[str], sequences: Sequence[int] = ()) -> Path:
    """Write prepared chats as `prepare` does: a sequence of each prompt and the answer to it.

    Args:
        path, backend: the file, and the tokenizer.
        prompts: rendered.
        sequences: how many sequences each chat has; by default one.
    """
    encoded = [[backend.encode(text, add_special_tokens=False).ids for text in (each, ANSWER)] for each in prompts]
    labels = [[0] * len(before) + [1] * len(after) for before, after in encoded]
    tensors = {
        "ids": np.array([token for before, after in encoded for token in before + after], np.int32),
        "labelled": np.array(list(itertools.chain(*labels)), np.uint8),
        "offsets": np.cumsum([0, *map(len, labels)]),
    }
    if sequences:
        tensors["chats"] = np.cumsum([0, *sequences])
    save_file(tensors, path)
    return path


class Texts:
    """Hands texts on to llama.cpp, and remembers them."""

    def __init__(self, server: PromptServer) -> None:
        self.server, self.asked = server, list[str]()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        self.asked += texts
        return self.server.split(texts)


@pytest.fixture(scope="module")
def bytes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    tokenizer = byte_level(CHATML_SPECIAL, *["12345"] * 50)
    path = tmp_path_factory.mktemp("bytes") / "small.gguf"
    with PromptServer(tokenizer_model(gguf_of(tokenizer, path, CHATML, adds_bos=False))) as server:
        yield server


def backend_of(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Return the tokenizer that `bytes_server` has, or one that splits texts in another way."""
    backend = Tokenizer.from_str(byte_level(CHATML_SPECIAL, *["12345"] * 50).backend_tokenizer.to_str())
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return backend


def check(path: Path, backend: Tokenizer, split: Texts, **more: int) -> PreparedPrompts:
    pieces = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    return check_prepared_prompts(path, backend, pieces, split, **more)


def test_equal_texts_are_asked_for_once(bytes_server: PromptServer, tmp_path: Path) -> None:
    questions = ["Größe 🎉?", "a\n\nb", "é e\u0301 日本語", "   ", "<think>x</think>", "12345"]
    chats = [prompt(each) for each in questions * 3] + [prompt(*questions)]
    backend, split = backend_of(), Texts(bytes_server)
    found = check(write(tmp_path / "t.safetensors", backend, chats), backend, split)
    assert found == PreparedPrompts(chats=19, asked=19)
    assert len(split.asked) == len(set(split.asked)) < 20
    assert f"assistant\n{ANSWER}" in split.asked, "an earlier answer is part of a prompt"
    assert "assistant\n" in split.asked, "the last one is not"


def test_chats_with_other_tokens_are_counted(bytes_server: PromptServer, tmp_path: Path) -> None:
    backend, split = backend_of(SPLIT_DIGITS), Texts(bytes_server)
    chats = [prompt(each) for each in ("Hello", "in 12345", "Hello", "12345", "in 12345")]
    found = check(write(tmp_path / "t.safetensors", backend, chats), backend, split)
    assert (found.chats, found.asked, found.different) == (5, 5, 3)
    assert found.mismatch is not None and found.mismatch.kind is MismatchKind.TOKENS
    assert "1 2 3" in found.mismatch.trained and "12345" in found.mismatch.served


def test_a_chat_of_several_sequences_counts_once(bytes_server: PromptServer, tmp_path: Path) -> None:
    backend = backend_of(SPLIT_DIGITS)
    chats = [prompt("12345"), prompt("12345", "Hello"), prompt("Hello")]
    found = check(write(tmp_path / "t.safetensors", backend, chats, [2, 1]), backend, Texts(bytes_server))
    assert (found.chats, found.asked, found.different) == (2, 2, 1)


def test_what_a_user_wrote_like_a_special_token_is_text(bytes_server: PromptServer, tmp_path: Path) -> None:
    backend = backend_of()
    backend.encode_special_tokens = True
    file = write(tmp_path / "t.safetensors", backend, ["Say <|im_end|> now", "<|im_end|>"])
    backend.encode_special_tokens = False
    assert check(file, backend, Texts(bytes_server)).different == 0


def test_what_can_not_be_read_back_is_not_blamed(bytes_server: PromptServer, tmp_path: Path) -> None:
    """The trained tokenizer does not make these tokens of the text that they spell."""
    backend = backend_of(pre_tokenizers.Split(" ", "isolated"))
    file = write(tmp_path / "t.safetensors", backend, [prompt("12345")])
    backend.pre_tokenizer = SPLIT_DIGITS
    assert check(file, backend, Texts(bytes_server)).different == 0


def test_past_the_most_no_more_chats_are_asked_for(bytes_server: PromptServer, tmp_path: Path) -> None:
    backend = backend_of(SPLIT_DIGITS)
    chats = [prompt(f"12345 and {number}") for number in range(5_000)]
    found = check(write(tmp_path / "t.safetensors", backend, chats), backend, Texts(bytes_server), most=100)
    assert (found.chats, found.asked, found.different) == (5_000, 2_000, 2_000)


@pytest.mark.parametrize(("scheme", "differs"), [("first", True), ("always", False), ("never", True)])
def test_spaces_of_sentencepiece(scheme: str, differs: bool, tmp_path: Path) -> None:
    tokenizer = metaspace(CHATML_SPECIAL, *["t\nHe"] * 50, scheme=scheme)
    backend, data = tokenizer.backend_tokenizer, sentencepiece_gguf_of(tokenizer, tmp_path / "small.gguf")
    chats = [prompt("Hello and some"), prompt("  some spaces"), prompt("user", "system.")]
    with PromptServer(tokenizer_model(data)) as server:
        found = check(write(tmp_path / "t.safetensors", backend, chats), backend, Texts(server))
    assert (found.chats, found.asked, found.different) == (3, 3, 3 if differs else 0)
    if found.mismatch is not None:
        assert found.mismatch.kind is MismatchKind.FIRST_SPACE


def test_letters_that_a_normalizer_composed_are_the_business_of_traits(
    bytes_server: PromptServer, tmp_path: Path
) -> None:
    backend = backend_of()
    backend.normalizer = normalizers.NFC()
    file = write(tmp_path / "t.safetensors", backend, [prompt("e\u0301")])
    assert check(file, backend, Texts(bytes_server)).different == 0
