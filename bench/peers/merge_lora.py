"""What the original scripts call merging: a trained folder loaded by transformers and saved again.

    python merge_lora.py TRAINED MERGED

torchtune has put whole weights and an adapter into one folder; the adapter's config has to go out of the way, or
transformers takes the folder for an adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(trained: Path, merged: Path) -> int:
    """Loads and saves."""
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
