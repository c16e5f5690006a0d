"""A base model with new tokens: a copy in the cache whose embedding and head have a row for each.

A new row starts as the mean of the rows that the token's text had before. So everything that reads a base model reads
one that has the tokens, and the original stays as it is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.chats.tokens.new_tokens import ExtendedTokenizer, NewToken, extend_tokenizer
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ModelError
from kolotune.foundation.files import replacing, require_space, size_of
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.weights.adapter import LoraAdapter
from kolotune.weights.adapter_config import AdapterConfig
from kolotune.weights.dtypes import as_f32
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.merge import MergedModel, companion_files
from kolotune.weights.model_config import read_model_config
from kolotune.weights.shards import split_into_shards, write_shards
from kolotune.weights.vocabulary import find_vocabulary
from kolotune.weights.weight_files import weight_files

from . import lookup

if TYPE_CHECKING:
    import numpy as np

_FORMAT = 1  # raised when the copy changes
_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "fp32"}
_MORE_TEMPLATES = "additional_chat_templates"


def resolve_base(config: Config, reporter: Reporter) -> Path:
    """Return the folder of a run's base model, with the run's new tokens if it has some.

    Raises:
        ConfigError, ModelError, OfflineError: see `lookup.resolve`; or a token can't be added.
    """
    base = lookup.resolve(config.base_model, config.hf_token, reporter)
    return with_new_tokens(base, new_tokens(config.new_token, config.new_special_token), reporter)


def locate_base(config: Config) -> Path | None:
    """Return the folder of a run's base model, with its new tokens, that is already on this machine; None otherwise."""
    base = lookup.locate(config.base_model)
    tokens = new_tokens(config.new_token, config.new_special_token)
    if base is None or not tokens:
        return base
    copy = _copy(base, tokens)
    return copy if copy.is_dir() else None


def new_tokens(plain: Iterable[str], special: Iterable[str]) -> list[NewToken]:
    """Return the tokens that options name, in the order of their ids."""
    return [*(NewToken(text, False) for text in plain), *(NewToken(text, True) for text in special)]


def with_new_tokens(base: Path, tokens: Sequence[NewToken], reporter: Reporter) -> Path:
    """Return a copy of a base model with new tokens, made when it is needed for the first time; without any, the base.

    Raises:
        ConfigError: a token can't be added.
        ModelError: the base's embedding is stored in a form that can't be extended.
        SpaceError: the cache's disk has no space for the copy.
    """
    if not tokens:
        return base
    target = _copy(base, tokens)
    if not target.is_dir():
        extended = extend_tokenizer(base, tokens)
        size = size_of(base)
        require_space(target.parent, size)
        noun = "token" if len(tokens) == 1 else "tokens"
        size_text = f"{format_size(size)} in kolotune's cache"
        reporter.doing(f"copying the base model with {len(tokens)} new {noun}, once ({size_text})")
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            partial.mkdir()
            _write(base, extended, partial, reporter)
    return target


def _copy(base: Path, tokens: Sequence[NewToken]) -> Path:
    """Return the folder of a copy, by the tokens and by names, sizes and times of the base's files."""
    facts = [str(_FORMAT), *(f"{token.is_special} {token.text}" for token in tokens)]
    for path in sorted(each for each in base.iterdir() if each.is_file()):
        status = path.stat()
        facts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    name = f"{base.name}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}"
    return cache_folder("extended_models") / name


def _write(base: Path, extended: ExtendedTokenizer, folder: Path, reporter: Reporter) -> None:
    files = MappedTensors(weight_files(base))
    vocabulary = find_vocabulary(files.entries, read_model_config(base))
    names = [name for name in (vocabulary.embedding, vocabulary.head) if name in files.entries]
    stored = files.entries[names[0]].dtype if names else ""
    if vocabulary.embedding not in names or stored not in _DTYPES:
        raise ModelError(
            f"{base}: its embedding is stored in a form that new tokens can't be added to", "Use another base model."
        )
    rows = {name: _with_rows(as_f32(files[name], files.entries[name].dtype), extended) for name in names}
    adapter = LoraAdapter(AdapterConfig(rank=1, ties_weights=True), replaced=rows)
    model = MergedModel(adapter, base, _DTYPES[stored])
    model.write(lambda: write_shards(folder, split_into_shards(model.entries), model.blocks), reporter)
    (folder / "config.json").write_text(model.config_text(), encoding="utf-8", newline="")
    for name, source in companion_files(base, base).items():
        shutil.copyfile(source, folder / name)
    for name, text in extended.files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    if (base / _MORE_TEMPLATES).is_dir():
        shutil.copytree(base / _MORE_TEMPLATES, folder / _MORE_TEMPLATES)


def _with_rows(matrix: np.ndarray, extended: ExtendedTokenizer) -> np.ndarray:
    """Return an embedding or head, fp32, with the rows of the new tokens; models may have unused rows for them."""
    import numpy as np

    count = max(len(matrix), extended.first + len(extended.parts))
    result = np.zeros((count, matrix.shape[1]), np.float32)
    result[: len(matrix)] = matrix
    for at, parts in enumerate(extended.parts, extended.first):
        result[at] = matrix[list(parts)].mean(axis=0)
    return result
