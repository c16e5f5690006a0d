"""Base and adapter as one model, computed in fp32 a block of rows at a time; nothing of it is ever whole in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.files import in_order
from kolotune.foundation.reporter import Reporter

from . import adapter as adapters
from .model_config import read_model_config
from .tensors import FLOATS, Entry, MappedTensors, as_f32, from_f32, row_blocks, weight_files

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_STORED_AS = {"f16": "F16", "bf16": "BF16", "fp32": "F32"}
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LARGEST_F16 = 65504.0


class _OutOfRange(Exception):
    """A value does not fit f16."""


class MergedModel:
    """What base and adapter are together.

    Args:
        adapter_folder: in PEFT's format; None: the base is stored as it is.
        base: model folder with safetensors.
        dtype: "f16", "bf16" or "fp32".

    Attributes:
        entries: every tensor as it is stored, in the order of the base.
        stored_wider: names of the weights that f16 can't hold; known when all have been computed.
        adapted: how many weights the adapter changes by a product.

    Raises:
        ArtifactError, ModelError: the adapter does not belong to the base, or a file is damaged.
    """

    def __init__(self, adapter_folder: Path | None, base: Path, dtype: str) -> None:
        nothing = adapters.Adapter(base, {}, {}, {})
        adapter = nothing if adapter_folder is None else adapters.read(adapter_folder)
        self._base = MappedTensors(weight_files(base))
        self._dtype = dtype
        self._config = read_model_config(base)
        names = self._base.entries
        self._deltas = {_base_name(name, names): self._oriented(each, name) for name, each in adapter.deltas.items()}
        self._replaced = {_base_name(name, names): each for name, each in adapter.replaced.items()}
        self.adapted = len(adapter.deltas)
        self.stored_wider: list[str] = []
        self._untied = _HEAD not in names and _changes_one_of_two(adapter, {*self._deltas, *self._replaced})
        self._check()

    def _check(self) -> None:
        """Whether the adapter belongs to the base."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        hint = "Give the base model that the adapter was trained on (--base)."
        for name in (*self._deltas, *self._replaced):
            if name not in shapes:
                raise ArtifactError(f"the adapter changes {name}, which the base model does not have", hint)
        for name, delta in self._deltas.items():
            if delta.shape != shapes[name]:
                cause = f"the adapter does not belong to this base model: it adds {delta.shape} to a weight of"
                raise ArtifactError(f"{cause} {shapes[name]}", hint)
        for name, whole in self._replaced.items():
            if whole.shape != shapes[name]:
                raise ArtifactError(f"{name}: the adapter brings {whole.shape} for {shapes[name]}")

    def _oriented(self, delta: adapters.Delta, name: str) -> adapters.Delta:
        """GPT-2 keeps all but its head as [in, out]; the adapter's config says so of its last module alone."""
        if self._config.model_type != "gpt2" or name.endswith((".wte.weight", ".wpe.weight")):
            return delta
        return replace(delta, transposed=_CONV1D.search(name) is not None)

    @property
    def entries(self) -> list[Entry]:
        found = []
        for name, entry in self._base.entries.items():
            if self._untied and name == _EMBEDDING:
                found.append(self._stored(_HEAD, entry))
            found.append(self._stored(name, entry))
        return found

    def _stored(self, name: str, source: Entry) -> Entry:
        dtype = source.dtype
        if dtype in FLOATS:
            as_it_was = dtype == "BF16" and name not in self._deltas and name not in self._replaced
            dtype = _STORED_AS[self._dtype]
            if name in self.stored_wider:
                dtype = "BF16" if as_it_was else "F32"
        return Entry(name, dtype, source.shape)

    def config_text(self) -> str:
        """The base's config with the dtype that the weights ask for in arithmetic.

        Gemma overflows in f16 arithmetic, though its weights fit: it asks for bfloat16.
        """
        config = dict(self._config.values)
        gemma = self._config.model_type.startswith("gemma")
        arithmetic = {"f16": "bfloat16" if gemma else "float16", "bf16": "bfloat16", "fp32": "float32"}[self._dtype]
        for key in _DTYPE_KEYS:
            if key in config or key == "dtype":
                config[key] = arithmetic
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {key: value for key, value in text.items() if key not in _DTYPE_KEYS}
        if self._untied:
            config["tie_word_embeddings"] = False
        return json.dumps(config, indent=2) + "\n"

    def written(self, write: Callable[[], T], reporter: Reporter) -> T:
        """Calls `write`, which asks for all `blocks`; a second time when a weight turned out not to fit f16.

        Raises:
            ArtifactError: a merged weight is not finite.
        """
        try:
            return write()
        except _OutOfRange:
            self.stored_wider = [entry.name for entry in self.entries if not self._fits(entry)]
        first, count = self.stored_wider[0], len(self.stored_wider)
        reporter.warning(f"{count} weights are out of f16's range and stay wider: {first} …")
        return write()

    def _fits(self, entry: Entry) -> bool:
        try:
            for _ in self.blocks(entry):
                pass
        except _OutOfRange:
            return False
        return True

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        """The values of one of the `entries`, in its dtype, some rows at a time; within `written` only."""
        return in_order(partial(self._block, entry, rows) for rows in row_blocks(entry))

    def _block(self, entry: Entry, rows: slice) -> np.ndarray:
        import numpy as np

        name = entry.name
        source = name if name in self._base.entries else _EMBEDDING
        stored = self._base.entries[source].dtype
        base = self._base[source]
        part = base[rows] if base.ndim else base.reshape(1)
        if entry.dtype not in FLOATS:
            return part
        delta, whole = self._deltas.get(name), self._replaced.get(name)
        with np.errstate(all="ignore"):
            # PEFT saves adapted embeddings and heads whole, beside their adapters: one is added to the other.
            values = as_f32(part, stored) if whole is None else (whole[rows] if whole.ndim else whole.reshape(1))
            if delta is not None:
                values = np.add(product := delta.rows(rows), values, out=product)
            largest = max(abs(float(values.max())), abs(float(values.min()))) if values.size else 0.0
        if not np.isfinite(largest):
            raise ArtifactError(f"{name}: a merged weight is not finite", "Train again with a lower --learning-rate.")
        if entry.dtype == "F16" and largest > _LARGEST_F16:
            raise _OutOfRange
        return part if stored == entry.dtype and delta is None and whole is None else from_f32(values, entry.dtype)


def small_files(base: Path, tokenizer: Path) -> dict[str, Path]:
    """What goes with a merged model's weights and config, by name: the tokenizer's files, from where it has them."""
    found = {}
    for name in ("generation_config.json", *TOKENIZER_FILES):
        source = next((folder / name for folder in (tokenizer, base) if (folder / name).is_file()), None)
        if source is not None:
            found[name] = source
    return found


def tokenizer_of(adapter: Path, base: Path) -> Path:
    """An adapter's own tokenizer folder when it has a tokenizer, else the base's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file() else base


def _changes_one_of_two(adapter: adapters.Adapter, changed: Set[str]) -> bool:
    """Whether tied embedding and head differ with the adapter: PEFT changes just the one that it names."""
    return _HEAD in changed or (_EMBEDDING in changed and not adapter.config.get("ensure_weight_tying"))


def _base_name(name: str, names: Sequence[str] | Set[str] | dict[str, Entry]) -> str:
    """The base's name of an adapted weight: some bases are saved without the outer module's name."""
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in names:
            return candidate
    return name
