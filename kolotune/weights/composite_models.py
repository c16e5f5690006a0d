"""Composite models, such as those that see images: which of their weights are the language model's.

The language model is tuned with text alone. What belongs to it is found in the files by prefix, and proven by layers
and shapes; transformers' class for the whole model computes it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ModelError

from .mapped_tensors import MappedTensors
from .model_config import ModelConfig, read_model_config
from .stored_names import StoredNames
from .weight_files import weight_files

_LAYER = re.compile(r"((?:.+\.)?)layers\.(\d+)\..+")
_OTHER = "Choose a language model without other parts, or a different --base-model."


def is_composite(config: ModelConfig) -> bool:
    """Return whether a language model is only a part of the model; Qwen 2.5 VL has its settings at the root."""
    return any(isinstance(config.values.get(part), dict) for part in ("text_config", "vision_config", "audio_config"))


def language_prefix(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> str:
    """Return what the names of the language model's weights in the files begin with; "" if nothing.

    Args:
        shapes: of all weights in the files.
        config: of the composite model.

    Raises:
        ModelError: no part of the files has the language model's layers and width, or several have.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    for name in shapes:
        if match := _LAYER.fullmatch(name):
            layers[match[1]].add(int(match[2]))
    wanted = (config.vocabulary_size, config.hidden_size)
    candidates = [
        prefix
        for prefix, numbers in layers.items()
        if numbers == set(range(config.layers)) and shapes.get(f"{prefix}embed_tokens.weight", ())[1:] == wanted[1:]
    ]
    if len(candidates) != 1:
        described = f"{config.layers} layers and an embedding of width {config.hidden_size}"
        raise ModelError(
            f"{config.path.parent}: {len(candidates) or 'no'} parts of its weights are a language model of {described}",
            _OTHER,
        )
    return candidates[0]


def language_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that are trained or computed for a text; all of a model that is not composite.

    Raises:
        ModelError: see `language_prefix`.
    """
    if not is_composite(config):
        return dict(shapes)
    prefix = language_prefix(shapes, config)
    outer = prefix.removesuffix("model.")
    heads = {"lm_head.weight", f"{outer}lm_head.weight", f"{prefix}lm_head.weight"}
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix) or name in heads}


def model_class(config: Any) -> Any:
    """Return the class of transformers that makes a model from a config: of language models, or of composite ones."""
    import transformers

    library: Any = transformers
    is_known = type(config) in library.AutoModelForCausalLM._model_mapping
    return library.AutoModelForCausalLM if is_known else library.AutoModelForImageTextToText


def language_module(model: Any) -> tuple[str, Any]:
    """Return the language model inside a composite model of transformers, with its name; ("", model) of others."""
    config = model.config
    if config.get_text_config() is config:
        return "", model
    decoder = model.get_decoder()
    return next((name, module) for name, module in model.named_modules() if module is decoder)


def check(folder: Path) -> None:
    """Prove that a composite model's language model can be tuned: transformers and the files have the same weights.

    Raises:
        ModelError: they don't; the reason names what differs.
    """
    config = read_model_config(folder)
    if not is_composite(config):
        return

    import torch
    import transformers

    entries = MappedTensors(weight_files(folder)).entries
    shapes = {name: entry.shape for name, entry in entries.items()}
    prefix = language_prefix(shapes, config)
    library: Any = transformers
    try:
        settings = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = model_class(settings).from_config(settings, trust_remote_code=False)
        name, language = language_module(model)
        head = model.get_output_embeddings()
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder}: transformers can't make this composite model: {reason}", _OTHER) from error
    names = StoredNames(folder, entries)
    for path, module in language.named_modules():
        if type(module) is not torch.nn.Linear or module is head:
            continue
        weight = ".".join(filter(None, (name, path, "weight")))
        stored = names.find(weight)
        if stored is None or shapes[stored] != tuple(module.weight.shape) or not stored.startswith(prefix):
            raise ModelError(f"{folder}: its files have no weight that is transformers' {weight}", _OTHER)
