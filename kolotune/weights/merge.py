"""Merge an adapter into its base: computed in fp32 a block of rows at a time, never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.ordered_tasks import run_in_order
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject

from .adapter import LoraAdapter, read_adapter
from .adapter_changes import StoredChanges, check_changes, stored_changes
from .adapter_config import AdapterConfig
from .adapter_kinds import Instead
from .dtypes import FLOATS, as_f32, from_f32
from .lora_delta import Delta, ExpertDelta
from .mapped_tensors import MappedTensors, row_blocks
from .model_config import read_model_config
from .safetensors_header import Entry
from .stored_names import StoredNames
from .vocabulary import check_sizes, find_vocabulary, token_count
from .weight_files import weight_files

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_STORED_AS = {"f16": "F16", "bf16": "BF16", "fp32": "F32"}
_DTYPE_KEYS = ("torch_dtype", "dtype")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What a composite model's other parts read their inputs by."""
_LARGEST_F16 = 65504.0
_NO_ADAPTER = LoraAdapter(AdapterConfig(rank=1))


class _OutOfRange(Exception):
    """A value does not fit f16."""


class MergedModel:
    """A base model with an adapter merged into it.

    Args:
        adapter: its folder, in PEFT's format, or what it changes; None: the base alone, stored as `dtype`.
        base: model folder with safetensors.
        dtype: "f16", "bf16" or "fp32".

    Attributes:
        stored_wider: names of the weights that f16 can't hold; complete once all blocks have been computed.
        adapted: number of weights with a low-rank update.

    Raises:
        ArtifactError, ModelError: the adapter does not belong to the base, or a file is damaged.
    """

    def __init__(self, adapter: Path | LoraAdapter | None, base: Path, dtype: str) -> None:
        if not isinstance(adapter, LoraAdapter):
            adapter = _NO_ADAPTER if adapter is None else read_adapter(adapter)
        self._base = MappedTensors(weight_files(base))
        self._dtype = dtype
        self._config = read_model_config(base)
        self._vocabulary = find_vocabulary(self._base.entries, self._config)
        self._changes = stored_changes(adapter, StoredNames(base, self._base.entries), self._shapes(), self._config)
        self._deltas, self._replaced = self._changes.deltas, self._changes.replaced
        self._rows = self._rows_with_new_tokens()
        self.adapted = len(adapter.deltas) + len(adapter.experts)
        self.stored_wider: list[str] = []
        self._unties = self._vocabulary.is_untied_by(adapter.config, self._deltas, self._replaced)
        if self._unties:
            self._changes.share_new_tokens(self._vocabulary, self._shapes())
        elif self._vocabulary.is_tied:
            self._changes.tie(self._vocabulary)
        self._prepared: tuple[str, Delta | ExpertDelta] | None = None
        self._preparing = Lock()
        self._check()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._base.entries.items()}

    def _rows_with_new_tokens(self) -> dict[str, int]:
        """Return the rows of embedding and head where the adapter has rows of tokens beyond the base's."""
        last = {name: int(tokens.indices.max(initial=-1)) for name, tokens in self._changes.token_rows.items()}
        names = [name for name in self.vocabulary_names if name in self._base.entries and name not in self._replaced]
        rows = max([-1, *last.values()]) + 1
        return {name: rows for name in names if rows > self._base.entries[name].rows}

    def _check(self) -> None:
        """Check that the adapter belongs to the base."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        check_changes(self._changes, shapes, self._shapes(), self._vocabulary)
        check_sizes({name: shape[0] for name, shape in shapes.items() if shape}, self._vocabulary)
        head = self._deltas.get(self._vocabulary.head)
        if self._unties and isinstance(head, Delta) and head.initial is not None:
            raise ModelError(
                "the adapter's update of a tied head started as a part of it, which the embedding lost, too",
                Instead.INITIAL.value,
            )

    @property
    def changes(self) -> StoredChanges:
        """What the adapter changes."""
        return self._changes

    @property
    def vocabulary_names(self) -> frozenset[str]:
        """The names of the base's embedding and head."""
        return frozenset((self._vocabulary.embedding, self._vocabulary.head))

    def check_tokenizer(self, folder: Path) -> None:
        """Check that there is an embedding for every token of a tokenizer.

        Raises:
            ArtifactError: there is not.
        """
        embedding = next((entry for entry in self.entries if entry.name == self._vocabulary.embedding), None)
        tokens = token_count(folder)
        if embedding is not None and tokens > embedding.rows:
            raise ArtifactError(
                f"{folder}: its tokenizer has {tokens} tokens, the model embeddings of {embedding.rows}",
                "Save the adapter again with save_pretrained(…, save_embedding_layers=True).",
            )

    @property
    def entries(self) -> list[Entry]:
        """Every tensor as it is stored, in the order of the base."""
        entries = []
        for name, entry in self._base.entries.items():
            if self._unties and name == self._vocabulary.embedding and not self._vocabulary.is_stored_twice:
                entries.append(self._stored(self._vocabulary.head, entry))
            entries.append(self._stored(name, entry))
            bias = f"{name.removesuffix('weight')}bias"
            if bias in self._changes.new_biases:
                entries.append(self._stored(bias, Entry(bias, entry.dtype, self._changes.new_biases[bias])))
        return entries

    def _stored(self, name: str, source: Entry) -> Entry:
        dtype, shape = source.dtype, source.shape
        if dtype in FLOATS:
            unchanged = dtype == "BF16" and name not in self._changes
            dtype = _STORED_AS[self._dtype]
            if name in self.stored_wider:
                dtype = "BF16" if unchanged else "F32"
        if name in self._replaced:
            shape = self._replaced[name].shape
        elif source.name in self._rows:
            shape = (self._rows[source.name], *shape[1:])
        return Entry(name, dtype, shape)

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
            section = {key: value for key, value in text.items() if key not in _DTYPE_KEYS}
            config["text_config"] = section | self._vocabulary_settings(section)
        config |= self._changes.settings | self._vocabulary_settings(config)
        if self._unties:
            config["tie_word_embeddings"] = False
        return json.dumps(config, indent=2) + "\n"

    def _vocabulary_settings(self, section: JsonObject) -> JsonObject:
        """Return the settings of a section of the config that the adapter changes."""
        settings: JsonObject = {}
        if self._unties and "tie_word_embeddings" in section:
            settings["tie_word_embeddings"] = False
        embedding = self._replaced.get(self._vocabulary.embedding)
        rows = self._rows.get(self._vocabulary.embedding) if embedding is None else len(embedding)
        if rows is not None and "vocab_size" in section:
            settings["vocab_size"] = rows
        return settings

    def write(self, write: Callable[[], T], reporter: Reporter) -> T:
        """Call a function that reads all `blocks`; call it again when a weight did not fit f16.

        Raises:
            ArtifactError: a merged weight is not finite.
        """
        started = [delta.initial for delta in self._deltas.values() if isinstance(delta, Delta) and delta.initial]
        if started:
            reporter.note(f"computing again what {len(started)} weights were reduced by: {started[0].value}")
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
        source = name if name in self._base.entries else self._vocabulary.embedding
        if name in self._changes.new_biases:
            return from_f32(self._changes.bias(name)[rows], entry.dtype)
        stored = self._base.entries[source].dtype
        block = _rows(self._base[source], rows)
        if source in self._rows:
            block = _padded(block, len(range(*rows.indices(entry.rows))))
        if entry.dtype not in FLOATS:
            return block
        delta, whole = self._deltas.get(name), self._replaced.get(name)
        with np.errstate(all="ignore"):
            # PEFT saves an adapted embedding or head whole beside its adapter; the two are added.
            values = as_f32(block, stored) if whole is None else _rows(whole, rows)
            if delta is not None:
                values = self._completed(name, delta, source).added_to(values, rows)
            values = self._changes.with_vectors(name, values, rows)
            largest = max(abs(float(values.max())), abs(float(values.min()))) if values.size else 0.0
        if not np.isfinite(largest):
            raise ArtifactError(f"{name}: a merged weight is not finite", "Train again with a lower --learning-rate.")
        if entry.dtype == "F16" and largest > _LARGEST_F16:
            raise _OutOfRange
        return block if stored == entry.dtype and name not in self._changes else from_f32(values, entry.dtype)

    def _completed(self, name: str, delta: Delta | ExpertDelta, source: str) -> Delta | ExpertDelta:
        """Return a weight's update with all that has to be known of the whole weight; the newest one is kept."""
        if isinstance(delta, ExpertDelta) or delta.is_complete:
            return delta
        with self._preparing:
            if self._prepared is None or self._prepared[0] != name:
                self._prepared = (name, delta.completed(partial(self._base_rows, name, source)))
            return self._prepared[1]

    def _base_rows(self, name: str, source: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the values, fp32, of all rows that the update of a weight is added to."""
        entry, whole = self._base.entries[source], self._replaced.get(name)
        if whole is not None:
            entry = Entry(name, "F32", whole.shape)
        for rows in row_blocks(entry):
            yield rows, as_f32(self._base[source][rows], entry.dtype) if whole is None else whole[rows]


def _padded(block: np.ndarray, count: int) -> np.ndarray:
    """Return a block of `count` rows, the last of which are zeros."""
    import numpy as np

    return np.concatenate([block, np.zeros((count - len(block), *block.shape[1:]), block.dtype)])


def _rows(tensor: np.ndarray, rows: slice) -> np.ndarray:
    return tensor[rows] if tensor.ndim else tensor.reshape(1)


def companion_files(base: Path, tokenizer: Path) -> dict[str, Path]:
    """Return the files that go with a merged model's weights and config, by name: mainly the tokenizer's."""
    files = {}
    for name in ("generation_config.json", *_PROCESSOR_FILES, *TOKENIZER_FILES):
        source = next((folder / name for folder in (tokenizer, base) if (folder / name).is_file()), None)
        if source is not None:
            files[name] = source
    return files


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Return the adapter's folder if it has a tokenizer, else the base's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file() else base
