"""A model's ``config.json``: read once, checked, and asked by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ModelError
from kolotune.foundation.typed_storage import JsonObject

FILE = "config.json"
_ROPE_THETA = 10_000.0  # transformers' default for Llamas


@dataclass(frozen=True)
class RotaryEmbedding:
    """Settings of the rotary position embedding.

    Attributes:
        kind: "default", "linear", "llama3", …
        theta: base of the frequencies.
        values: all settings, as in the file.
    """

    kind: str
    theta: float
    values: JsonObject

    def number(self, name: str, default: float | None = None) -> float:
        """Return a setting.

        Raises:
            ModelError: it is not a number, or missing or null without a default.
        """
        found = self.values.get(name)
        return self._number(name, default if found is None else found)

    def numbers(self, name: str) -> list[float]:
        """Return a setting that is a list of numbers.

        Raises:
            ModelError: it is missing, or something else.
        """
        found = self.values.get(name)
        return [self._number(name, each) for each in (found if isinstance(found, list) else [found])]

    @staticmethod
    def _number(name: str, found: object) -> float:
        if not _is_number(found):
            raise ModelError(f"rotary embedding of the model: {name} is {found!r}, not a number")
        return float(found)


@dataclass(frozen=True)
class ModelConfig:
    """The settings in a model's ``config.json``.

    Attributes:
        path: the file, for messages.
        values: all settings, as in the file.
    """

    path: Path
    values: JsonObject

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names of transformers' classes for this model; usually one."""
        found = self.values.get("architectures")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def model_type(self) -> str:
        """The model's family, such as "llama"; "" when the file names none."""
        return str(self.values.get("model_type") or "")

    @property
    def text(self) -> JsonObject:
        """Settings of the language model; a composite model keeps some of them under ``text_config``."""
        return {**self.values, **self._section("text_config")}

    @property
    def hidden_size(self) -> int:
        """Width of the layers; 0 when unknown."""
        return self.integer("hidden_size", "n_embd") or 0

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.integer("num_hidden_layers", "n_layer") or 1

    @property
    def attention_heads(self) -> int:
        """Number of query heads."""
        return self.integer("num_attention_heads", "n_head") or 1

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.integer("num_key_value_heads") or self.attention_heads

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.integer("head_dim") or self.hidden_size // self.attention_heads

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens; 0 when unknown."""
        return self.integer("vocab_size") or 0

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model was made for, in tokens."""
        return self.integer("max_position_embeddings")

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the input embedding."""
        return bool(self.values.get("tie_word_embeddings"))

    @property
    def is_quantized(self) -> bool:
        """Whether the weights in the folder are quantized."""
        return bool(self.values.get("quantization_config"))

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of attention of each layer; () when the file does not say."""
        found = self.values.get("layer_types")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def rotary(self) -> RotaryEmbedding:
        """The rotary embedding; older files keep its settings in two places and call the kind ``type``."""
        section = self._section("rope_parameters") or self._section("rope_scaling")
        theta = section.get("rope_theta", self.values.get("rope_theta", _ROPE_THETA))
        kind = section.get("rope_type", section.get("type")) or "default"
        return self.rotary_embedding({**section, "rope_theta": theta}, str(kind))

    def rotary_embedding(self, values: JsonObject, kind: str) -> RotaryEmbedding:
        """Return a rotary embedding of these settings.

        Raises:
            ModelError: the base is not a number.
        """
        theta = values.get("rope_theta")
        if not _is_number(theta):
            raise self._error("rope_theta", theta, "a number")
        return RotaryEmbedding(kind, float(theta), values)

    def integer(self, *names: str) -> int | None:
        """Return the first of these settings of the language model that is present and not null.

        Raises:
            ModelError: it is not a whole number.
        """
        text = self.text
        for name in names:
            value = text.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if value is not None:
                raise self._error(name, value, "a whole number")
        return None

    def required_integer(self, name: str) -> int:
        """Like `integer`, for a setting that must be present."""
        found = self.integer(name)
        if found is None:
            raise self._error(name, found, "a whole number")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A setting of the language model that may have a fraction.

        Raises:
            ModelError: it is not a number, or missing without a default.
        """
        found = self.text.get(name, default)
        if not _is_number(found):
            raise self._error(name, found, "a number")
        return float(found)

    def _section(self, name: str) -> JsonObject:
        found = self.values.get(name)
        return found if isinstance(found, dict) else {}

    def _error(self, name: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {name} is {value!r}, not {expected}", "Download the model again.")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_model_config(folder: Path) -> ModelConfig:
    """Read the ``config.json`` of a model folder.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    path = folder / FILE
    try:
        return ModelConfig(path, typed_storage.read_object(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{folder}: not a model folder (no {FILE})", "Give a folder in the Hugging Face format."
        ) from None
    except (OSError, typed_storage.StorageError) as error:
        raise ModelError(f"{path}: can't be read: {error}", "Download the model again.") from None
