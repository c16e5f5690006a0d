"""Which base model an adapter made elsewhere needs: the one that it names, if that can be merged into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kolotune.foundation.errors import ConfigError, ModelNotFoundError
from kolotune.weights.adapter import read_adapter
from kolotune.weights.adapter_folder import FILE
from kolotune.weights.model_config import read_model_config

from . import lookup
from .catalog import path_exists
from .hub import is_hub_id

_QUANTIZED = re.compile(
    r"[-_.](unsloth[-_])?(bnb[-_]?)?([2-8][-_]?bits?|awq|gptq|gguf|exl2|hqq|aqlm|eetq|n?fp[48]|nvfp4|mxfp4|int[48]|w[48]a\d+)"
    r"([-_.].*)?$",
    re.IGNORECASE,
)
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
_KAGGLE = re.compile(
    r"/kaggle/input/(?:models/)?(?:[^/]+/)?(?P<model>[^/]+)/(?:transformers|pytorch)/(?P<variant>[^/]+)/"
)
_OWNERS = {
    "meta-llama": "meta-llama", "llama": "meta-llama", "qwen": "Qwen", "qwq": "Qwen", "mistral": "mistralai",
    "mixtral": "mistralai", "ministral": "mistralai", "codestral": "mistralai", "gemma": "google", "phi": "microsoft",
    "smollm": "HuggingFaceTB", "granite": "ibm-granite", "olmo": "allenai", "deepseek": "deepseek-ai",
    "gpt-oss": "openai", "falcon": "tiiuae", "tinyllama": "TinyLlama", "glm": "zai-org", "starcoder": "bigcode",
}  # fmt: skip
"""Who publishes a family of models, by the beginning of their names."""
_RENAMED_BY = frozenset({"mlx-community", "thebloke", "lmstudio-community", "bartowski", "modelcloud", "redhatai"})
"""Owners on the hub that keep quantized copies of other owners' models, and no 16-bit ones."""


def unquantized_name(name: str) -> str:
    """Return a guess of the hub's name of a 16-bit model; "" if there is none.

    Args:
        name: of a quantized copy of it, or a path to it on another machine, as an adapter's config gives it.
    """
    text = name.replace("\\", "/").rstrip("/")
    if match := _CACHED.search(text + "/"):
        return f"{match['owner']}/{match['name']}"
    if match := _KAGGLE.search(text + "/"):
        return _published(f"{match['model']}-{match['variant']}")
    owner, _, model = text.rpartition("/")
    model = model.replace("___", ".")
    plain = _QUANTIZED.sub("", model)
    owner = owner.rpartition("/")[2]
    if is_hub_id(text) and plain != model and owner.lower() not in _RENAMED_BY:
        return f"{owner}/{plain}"
    return _published(plain)


def _published(model: str) -> str:
    owner = next((owner for family, owner in _OWNERS.items() if model.lower().startswith(family)), "")
    return f"{owner}/{model}" if owner and is_hub_id(f"{owner}/{model}") else ""


def base_of(adapter: Path, given: str | None) -> str:
    """Return the name or folder of the base model to merge an adapter into; nothing is downloaded.

    Args:
        adapter: the adapter's folder.
        given: the base that the user names; None: the one that the adapter names.

    Raises:
        ConfigError: neither names one, or it is a quantized copy or a path of another machine.
        ModelError, ArtifactError: the adapter can't be merged.
    """
    named = read_adapter(adapter).config.base_name
    name = given or named
    if not name:
        raise ConfigError(f"{adapter}: {FILE} does not name a base model", _hint(named))
    source = "--base" if given else f"{adapter}: the base model that {FILE} names"
    if not path_exists(name) and is_hub_id(name) and _QUANTIZED.search(name.rpartition("/")[2]):
        raise ConfigError(f"{source}, {name}, is a quantized copy; merging needs weights of 16 or 32 bits", _hint(name))
    folder = lookup.locate(name) if path_exists(name) else None
    if folder is not None and (folder / "config.json").is_file() and read_model_config(folder).is_quantized:
        raise ConfigError(f"{source}, {name}, is quantized; merging needs weights of 16 or 32 bits", _hint(name))
    if not given and folder is None and not is_hub_id(name) and not lookup.is_known(name):
        raise ConfigError(f"{source}, {name}, is a path that does not exist on this machine", _hint(name))
    return name


@contextmanager
def naming_the_option(adapter: Path, given: str | None) -> Iterator[None]:
    """Add the option to name another base to the error for a base that does not exist."""
    try:
        yield
    except ModelNotFoundError as error:
        if given:
            raise
        raise ModelNotFoundError(
            f"{adapter}: the base model that {FILE} names can't be found: {error.cause}",
            _hint(read_adapter(adapter).config.base_name),
        ) from error


def _hint(name: str) -> str:
    guess = unquantized_name(name)
    if guess and guess != name:
        return f"Name the unquantized model with --base; judging by the name, --base {guess}"
    return "Name it with --base: a folder, or the model's name on the hub."
