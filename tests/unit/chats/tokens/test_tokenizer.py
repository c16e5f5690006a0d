"""The tokenizer loaded without PyTorch equals the one that AutoTokenizer loads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support import llama3
from transformers import AutoTokenizer

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.foundation.reporter import PlainReporter

PIECES = [
    "Hello",
    " world",
    "\n",
    "  ",
    "12",
    "3456",
    "é",
    "日本",
    "🙂",
    "<|im_start|>",
    "<|eot_id|>",
    "don't",
    "\t",
    ".",
    "x_y",
]


@pytest.fixture(params=["smollm2", "llama3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "smollm2":
        return packaged_model.unpack(PlainReporter())
    llama3.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return tmp_path


def test_it_equals_autotokenizers(folder: Path) -> None:
    loaded, expected = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is type(expected)
    assert loaded.special_tokens_map == expected.special_tokens_map and loaded.get_vocab() == expected.get_vocab()
    dice = random.Random(0)
    for _ in range(300):
        text = "".join(dice.choices(PIECES, k=dice.randint(1, 12)))
        for special in (True, False):
            assert (
                loaded(text, add_special_tokens=special).input_ids
                == expected(text, add_special_tokens=special).input_ids
            )


def test_it_needs_no_pytorch(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from kolotune.chats.tokens.tokenizer import load_tokenizer;"
        "load_tokenizer(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
