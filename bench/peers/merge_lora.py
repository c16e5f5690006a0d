"""The merge step of the original scripts: transformers loads the trained folder and saves it again.

    python merge_lora.py TRAINED MERGED

torchtune saves full weights and an adapter in one folder. The adapter's config has to be renamed, or transformers loads
the folder as an adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(trained: Path, merged: Path) -> int:
    """Load and save."""
    config = trained / "adapter_config.json"
    if config.is_file():
        config.rename(trained / "adapter_config.json.backup")
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
