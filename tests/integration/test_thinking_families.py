"""Templates whose prompts open a thought: chats of several turns are trained whole, and served as they are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.families import THINKING_FAMILIES, tiny_family, write_long_chats

from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import HELD_OUT_CHATS, TRAIN_TOKENS, RunFolder

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {
    "epochs": 1, "lora_rank": 2, "batch_size": 2, "quantization": ("none",), "compare": True, "compare_answers": 1,
    "template_date": "2026-03-05",
}  # fmt: skip


def trained_text(folder: RunFolder) -> str:
    """Return the text of all tokens with a loss, those with none as a line break."""
    data, tokenizer = load_file(folder.prepared / TRAIN_TOKENS), load_tokenizer(folder.tokenizer)
    ids, trained = data["ids"], data["labelled"].astype(bool)
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    return "\n".join(tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2))


@pytest.mark.parametrize("name", THINKING_FAMILIES)
def test_no_answer_is_lost(
    name: str, run_all: Callable[..., Any], toolchain: object, reporter: PlainReporter, tmp_path: Path
) -> None:
    family = THINKING_FAMILIES[name]
    base, chats = tiny_family(tmp_path / "base", family, reporter), write_long_chats(tmp_path / "chats.jsonl")
    run = run_all(tmp_path / "run", base, train_data=chats, eval_split=0.3, **OPTIONS).run
    comparison = Comparison.read(run.comparison)
    path = next(check for check in comparison.paths if check.is_ollamas)
    assert comparison.passed and path.path == "jinja"
    assert path.prompt_ids_equal.good == path.prompt_ids_equal.of >= 2
    assert "different" not in path.traits.values() or name == "gemma-4"  # a call beside text, which it has otherwise
    text = trained_text(run)
    held_out = (run.prepared / HELD_OUT_CHATS).read_text(encoding="utf-8")
    for number in range(8):
        for turn in range(3):
            answer = f"This number is {number}, {turn}"
            assert (text.count(answer + family.special[0]), held_out.count(answer)) in ((1, 0), (0, 1))
    assert 0 < held_out.count("This number is") < 24
