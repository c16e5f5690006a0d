"""A base model with new tokens: the copy's tokenizer and rows, and what can't be added."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kolotune.base_models.new_tokens import with_new_tokens
from kolotune.chats.tokens.new_tokens import NewToken
from kolotune.foundation import files
from kolotune.foundation.errors import ConfigError, SpaceError
from kolotune.foundation.reporter import PlainReporter

TOKENS = [NewToken("<tool>", False), NewToken("<|note|>", True)]


@pytest.fixture
def extended(tiny_base: Path, reporter: PlainReporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    return with_new_tokens(tiny_base, TOKENS, reporter)


def test_the_tokenizer_has_the_tokens(extended: Path, tiny_base: Path) -> None:
    before, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_base, extended))
    first = max(before.get_vocab().values()) + 1
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<|note|>"]) == [first, first + 1]
    ids = tokenizer("a<tool>b", add_special_tokens=False)["input_ids"]
    assert ids == [*before("a", add_special_tokens=False)["input_ids"], first,
                   *before("b", add_special_tokens=False)["input_ids"]]  # fmt: skip
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert special["<|note|>"] and not special["<tool>"]
    assert tokenizer("ordinary text")["input_ids"] == before("ordinary text")["input_ids"]


def test_rows_start_as_the_mean_of_what_the_text_was(extended: Path, tiny_base: Path) -> None:
    before, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_base, extended))
    name = "model.embed_tokens.weight"
    old, new = (load_file(folder / "model.safetensors")[name].float().numpy() for folder in (tiny_base, extended))
    for token in TOKENS:
        row = tokenizer.convert_tokens_to_ids(token.text)
        parts = before(token.text, add_special_tokens=False)["input_ids"]
        np.testing.assert_allclose(new[row], old[parts].mean(axis=0), atol=1e-3)
    others = [row for row in range(len(old)) if row not in tokenizer.convert_tokens_to_ids(["<tool>", "<|note|>"])]
    np.testing.assert_array_equal(new[others], old[others])
    config = json.loads((extended / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(extended)
    assert config["vocab_size"] == len(new) == model.get_input_embeddings().num_embeddings


def test_the_copy_is_made_once(extended: Path, tiny_base: Path, reporter: PlainReporter) -> None:
    written = (extended / "model.safetensors").stat().st_mtime_ns
    assert with_new_tokens(tiny_base, TOKENS, reporter) == extended
    assert (extended / "model.safetensors").stat().st_mtime_ns == written
    assert with_new_tokens(tiny_base, TOKENS[:1], reporter) != extended


def test_a_disk_without_space_is_refused_before_anything_is_written(
    tiny_base: Path, reporter: PlainReporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "free_space", lambda _: 1000)
    with pytest.raises(SpaceError, match="needed there"):
        with_new_tokens(tiny_base, TOKENS, reporter)
    assert not (tmp_path / "cache" / "extended_models").exists()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([NewToken("  ", False)], "needs a text"),
        ([TOKENS[0], TOKENS[0]], "given twice"),
        ([NewToken("a", False)], "the base's vocabulary has it"),
    ],
)
def test_what_can_not_be_added(
    tokens: list[NewToken], words: str, tiny_base: Path, reporter: PlainReporter, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        with_new_tokens(tiny_base, tokens, reporter)
