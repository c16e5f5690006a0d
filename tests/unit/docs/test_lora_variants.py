"""The page about variants of LoRA: its table of differences from PEFT is measured again, and names every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.lora_parity import measure_parity
from support.training import TrainingFolder, branching_chats

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "lora-variants.md").read_text(encoding="utf-8")
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA+": {"lora_plus_ratio": 4.0},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA, LoRA+": {"use_dora": True, "use_rslora": True, "lora_plus_ratio": 4.0},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA, DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "ranks and alphas by pattern": {"rank_pattern": ["q_proj=2", "mlp.*=6"], "alpha_pattern": ["(v|k)_proj=3"]},
    "new tokens": {"new_tokens": [40, 41, 42]},
    "modules trained whole": {"modules_to_save": ["norm", "input_layernorm", "lm_head"], "weight_decay": 0.0},
}
ROWS = {
    cells[0]: [float(cell) for cell in cells[1:]]
    for line in PAGE.partition("## Differences from PEFT")[2].splitlines()
    if line.startswith("| ")
    and not line.startswith("| variant |")
    and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}


def test_the_table_has_every_variant() -> None:
    assert list(ROWS) == list(VARIANTS)
    assert all(
        0 < bound <= limit for row in ROWS.values() for bound, limit in zip(row, (1e-5, 1e-4, 1e-4), strict=True)
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_no_difference_is_larger_than_the_table_says(
    name: str, make_training: Callable[..., TrainingFolder], tmp_path: Path
) -> None:
    folder = make_training(chats=branching_chats(9, 1), held_out=branching_chats(4, 2))
    found = measure_parity(folder.job(batch_size=3, epochs=2, learning_rate=2e-3, **VARIANTS[name]), tmp_path)
    assert found.learned > 0.1 and found.changed > 0.05, "nothing was learnt, so the comparison proves nothing"
    loss, forward, merge = ROWS[name]
    assert found.loss <= loss and found.forward <= forward and found.merge <= merge, found
