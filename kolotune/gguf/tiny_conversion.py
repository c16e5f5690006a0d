"""Convert a tiny model that has no tokenizer, in this process, which has imported PyTorch already."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ToolchainError
from kolotune.weights.model_config import read_model_config

from . import converter_settings

_TOKENIZER = "tokenizer.json"


def convert_without_tokenizer(root: Path, folder: Path, target: Path) -> None:
    """Write an f32 GGUF whose vocabulary has no texts.

    Args:
        root: the converter's folder.
        folder: of the model, in the hub's format.
        target: the file to write.

    Raises:
        ToolchainError: the converter can't convert the model.
    """
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    logging.getLogger().setLevel(logging.ERROR)
    import gguf
    import torch
    from conversion import ModelBase, get_model_class  # type: ignore[import-not-found]

    config = read_model_config(folder)
    architecture, tokens = config.architectures[0], config.vocabulary_size
    # Some classes count the tokenizer's entries.
    vocabulary = {"model": {"vocab": {f"<{number}>": number for number in range(tokens)}}, "added_tokens": []}
    (folder / _TOKENIZER).write_text(json.dumps(vocabulary), encoding="utf-8")

    def set_vocab(converter: Any) -> None:
        converter.gguf_writer.add_tokenizer_model("none")
        converter.gguf_writer.add_vocab_size(tokens)

    converter_settings.give_file_settings(ModelBase)
    try:
        model_class = get_model_class(architecture)
        converter_settings.leave_out_missing_drafts(model_class, folder)
        plain = type(
            model_class.__name__, (model_class,), {"set_vocab": set_vocab, "model_arch": model_class.model_arch}
        )
        with torch.inference_mode():
            converter = plain(folder, gguf.LlamaFileType.ALL_F32, target)
            if hasattr(converter, "impl"):  # Mistral 3's class only hands on to another one
                converter.impl.set_vocab = lambda: set_vocab(converter.impl)
            converter.write()
    except Exception as error:  # any of its hundred classes may raise anything
        raise ToolchainError(f"llama.cpp's converter: {type(error).__name__}: {error}") from error
