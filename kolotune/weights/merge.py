"""Merge an adapter into its base: computed in fp32 a block of rows at a time, never whole in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.ordered_tasks import run_in_order
from kolotune.foundation.reporter import Reporter

from .adapter import LoraAdapter, read_adapter
from .adapter_config import AdapterConfig
from .dtypes import FLOATS, as_f32, from_f32
from .lora_delta import Delta
from .mapped_tensors import MappedTensors, row_blocks
from .model_config import read_model_config
from .safetensors_header import Entry
from .weight_files import weight_files

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_STORED_AS = {"f16": "F16", "bf16": "BF16", "fp32": "F32"}
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LARGEST_F16 = 65504.0
_NO_ADAPTER = LoraAdapter(AdapterConfig(rank=1), {}, {})


class _OutOfRange(Exception):
    """A value does not fit f16."""


class MergedModel:
    """A base model with an adapter merged into it.

    Args:
        adapter_folder: in PEFT's format; None: the base alone, stored as `dtype`.
        base: model folder with safetensors.
        dtype: "f16", "bf16" or "fp32".

    Attributes:
        stored_wider: names of the weights that f16 can't hold; complete once all blocks have been computed.
        adapted: number of weights with a low-rank update.

    Raises:
        ArtifactError, ModelError: the adapter does not belong to the base, or a file is damaged.
    """

    def __init__(self, adapter_folder: Path | None, base: Path, dtype: str) -> None:
        adapter = _NO_ADAPTER if adapter_folder is None else read_adapter(adapter_folder)
        self._base = MappedTensors(weight_files(base))
        self._dtype = dtype
        self._config = read_model_config(base)
        names = self._base.entries
        self._deltas = {_base_name(name, names): self._oriented(delta, name) for name, delta in adapter.deltas.items()}
        self._replaced = {_base_name(name, names): weight for name, weight in adapter.replaced.items()}
        self.adapted = len(adapter.deltas)
        self.stored_wider: list[str] = []
        self._unties = _HEAD not in names and _changes_one_of_two(adapter, {*self._deltas, *self._replaced})
        self._prepared: tuple[str, Delta] | None = None
        self._preparing = Lock()
        self._check()

    def _check(self) -> None:
        """Check that the adapter belongs to the base."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        hint = "Give the base model that the adapter was trained on (--base)."
        for name in (*self._deltas, *self._replaced):
            if name not in shapes:
                raise ArtifactError(f"the adapter changes {name}, which the base model does not have", hint)
        for name, delta in self._deltas.items():
            if delta.shape != shapes[name]:
                cause = f"the adapter does not belong to this base model: it adds {delta.shape} to a weight of"
                raise ArtifactError(f"{cause} {shapes[name]}", hint)
        for name, weight in self._replaced.items():
            if weight.shape != shapes[name]:
                raise ArtifactError(f"{name}: the adapter has {weight.shape}, the base model {shapes[name]}", hint)

    def _oriented(self, delta: Delta, name: str) -> Delta:
        """GPT-2 stores all weights but its head as [in, out]; the adapter's config has the flag of its last module."""
        if self._config.model_type != "gpt2" or name.endswith((".wte.weight", ".wpe.weight")):
            return delta
        return replace(delta, transposed=_CONV1D.search(name) is not None)

    @property
    def entries(self) -> list[Entry]:
        """Every tensor as it is stored, in the order of the base."""
        entries = []
        for name, entry in self._base.entries.items():
            if self._unties and name == _EMBEDDING:
                entries.append(self._stored(_HEAD, entry))
            entries.append(self._stored(name, entry))
        return entries

    def _stored(self, name: str, source: Entry) -> Entry:
        dtype = source.dtype
        if dtype in FLOATS:
            unchanged = dtype == "BF16" and name not in self._deltas and name not in self._replaced
            dtype = _STORED_AS[self._dtype]
            if name in self.stored_wider:
                dtype = "BF16" if unchanged else "F32"
        return Entry(name, dtype, source.shape)

    def config_text(self) -> str:
        """Return the base's config with the dtype that the model is to be computed in.

        Gemma's weights fit f16 but overflow in its arithmetic, so it asks for bfloat16.
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
        if self._unties:
            config["tie_word_embeddings"] = False
        return json.dumps(config, indent=2) + "\n"

    def write(self, write: Callable[[], T], reporter: Reporter) -> T:
        """Call a function that reads all `blocks`; call it again when a weight did not fit f16.

        Raises:
            ArtifactError: a merged weight is not finite.
        """
        try:
            return write()
        except _OutOfRange:
            self.stored_wider = [entry.name for entry in self.entries if not self._fits(entry)]
        first, count = self.stored_wider[0], len(self.stored_wider)
        weights = f"1 weight is out of f16's range: {first}"
        if count > 1:
            weights = f"{count} weights are out of f16's range: {first}, …"
        reporter.warning(f"{weights}; stored in a wider type")
        return write()

    def _fits(self, entry: Entry) -> bool:
        try:
            for _ in self.blocks(entry):
                pass
        except _OutOfRange:
            return False
        return True

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        """Yield the values of one of the `entries` in its dtype, some rows at a time; only inside `write`."""
        return run_in_order(partial(self._block, entry, rows) for rows in row_blocks(entry))

    def _block(self, entry: Entry, rows: slice) -> np.ndarray:
        import numpy as np

        name = entry.name
        source = name if name in self._base.entries else _EMBEDDING
        stored = self._base.entries[source].dtype
        block = _rows(self._base[source], rows)
        if entry.dtype not in FLOATS:
            return block
        delta, whole = self._deltas.get(name), self._replaced.get(name)
        with np.errstate(all="ignore"):
            # PEFT saves an adapted embedding or head whole beside its adapter; the two are added.
            values = as_f32(block, stored) if whole is None else _rows(whole, rows)
            if delta is not None:
                values = self._measured(name, delta, source).added_to(values, rows)
            largest = max(abs(float(values.max())), abs(float(values.min()))) if values.size else 0.0
        if not np.isfinite(largest):
            raise ArtifactError(f"{name}: a merged weight is not finite", "Train again with a lower --learning-rate.")
        if entry.dtype == "F16" and largest > _LARGEST_F16:
            raise _OutOfRange
        return block if stored == entry.dtype and delta is None and whole is None else from_f32(values, entry.dtype)

    def _measured(self, name: str, delta: Delta, source: str) -> Delta:
        """Return a weight's update with all that has to be known of the whole weight; the newest one is kept."""
        if delta.magnitude is None or not delta.transposed:
            return delta
        with self._preparing:
            if self._prepared is None or self._prepared[0] != name:
                self._prepared = (name, delta.measured(self._base_rows(name, source)))
            return self._prepared[1]

    def _base_rows(self, name: str, source: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the values, fp32, of all rows that the update of a weight is added to."""
        entry, whole = self._base.entries[source], self._replaced.get(name)
        for rows in row_blocks(entry):
            yield rows, as_f32(self._base[source][rows], entry.dtype) if whole is None else whole[rows]


def _rows(tensor: np.ndarray, rows: slice) -> np.ndarray:
    return tensor[rows] if tensor.ndim else tensor.reshape(1)


def companion_files(base: Path, tokenizer: Path) -> dict[str, Path]:
    """Return the files that go with a merged model's weights and config, by name: mainly the tokenizer's."""
    files = {}
    for name in ("generation_config.json", *TOKENIZER_FILES):
        source = next((folder / name for folder in (tokenizer, base) if (folder / name).is_file()), None)
        if source is not None:
            files[name] = source
    return files


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Return the adapter's folder if it has a tokenizer, else the base's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file() else base


def _changes_one_of_two(adapter: LoraAdapter, changed: Set[str]) -> bool:
    """Whether the adapter makes tied embedding and head differ: PEFT changes only the one that it names."""
    return _HEAD in changed or (_EMBEDDING in changed and not adapter.config.ties_weights)


def _base_name(name: str, names: Collection[str]) -> str:
    """Return the base's name of an adapted weight; some bases are saved without the outer module's name."""
    return next((each for each in (name, name.removeprefix("model."), f"model.{name}") if each in names), name)
