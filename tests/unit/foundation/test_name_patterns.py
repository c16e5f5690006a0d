"""Patterns of modules' names: PEFT's rule, and what is no pattern."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from kolotune.foundation.name_patterns import by_pattern, read_patterns

NAMES = ("model.layers.1.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head")
PATTERNS = ("q_proj", "proj", "1.mlp.down_proj", r"layers\.1\..*", "(q|v)_proj", "model", "lm_head", ".*")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_for_the_modules_that_it_is_for_in_peft(pattern: str, name: str) -> None:
    fits_in_peft = pattern == name or get_pattern_key([pattern], name) == pattern
    assert (by_pattern({pattern: 8}, name, 4) == 8) == fits_in_peft


def test_the_first_pattern_that_fits_decides() -> None:
    assert by_pattern({"k_proj": 1, "q_proj": 2, ".*": 3}, NAMES[0], 4) == 2


def test_numbers_follow_the_last_sign() -> None:
    assert read_patterns(["q_proj=8", "(?=a)b = 4.5"]) == {"q_proj": 8.0, "(?=a)b": 4.5}


@pytest.mark.parametrize("entry", ["q_proj", "=8", "q_proj=", "q_proj=eight", "(a+)+=8", "(=8", "a" * 301 + "=8"])
def test_what_is_no_pattern(entry: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_patterns([entry])
    assert str(caught.value) == entry
