"""What an adapter changes, weight by weight as the base model's files have them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.typed_storage import JsonObject

from .adapter import LoraAdapter, TokenRows
from .initial_matrices import Initial
from .lora_delta import Delta, ExpertDelta
from .model_config import ModelConfig
from .stored_names import FusedRows, Piece, StoredNames
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_BIASES = {
    "attention_bias": re.compile(r".+\.self_attn\.[qkvo]_proj\.weight$"),
    "mlp_bias": re.compile(r".+\.mlp\.(gate|up|down)_proj\.weight$"),
}
"""Settings that give a Llama biases, and the weights that get one."""
_EXPERTS_IN_OUT = ("gpt_oss",)
"""Models whose experts are stored ``[experts, in, out]``."""
_GIVE_BASE = "Give the base model that the adapter was trained on (--base)."


@dataclass(frozen=True)
class StoredChanges:
    """Changes of a base model's weights, by their stored names.

    Attributes:
        deltas: low-rank updates.
        replaced: values in place of the base's.
        added: vectors that are added to biases.
        token_rows: rows that are replaced at the end.
        new_biases: shapes of biases that the base does not have.
        settings: what the model's config says because of them.
    """

    deltas: dict[str, Delta | ExpertDelta] = field(default_factory=dict)
    replaced: dict[str, np.ndarray] = field(default_factory=dict)
    added: dict[str, np.ndarray] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    new_biases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return any(name in changes for changes in (self.deltas, self.replaced, self.added, self.token_rows))

    def with_vectors(self, name: str, values: np.ndarray, rows: slice) -> np.ndarray:
        """Return some rows of a weight with what is added to it or put in its place, fp32."""
        import numpy as np

        if name in self.added:
            values = values + self.added[name][rows]
        if name in self.token_rows:
            tokens = self.token_rows[name]
            inside = (tokens.indices >= rows.start) & (tokens.indices < rows.start + len(values))
            values = np.array(values)
            values[tokens.indices[inside] - rows.start] = tokens.values[inside]
        return values

    def bias(self, name: str) -> np.ndarray:
        """Return the values of one of the `new_biases`, fp32."""
        import numpy as np

        return self.added.get(name, np.zeros(self.new_biases[name], np.float32))

    def tie(self, vocabulary: Vocabulary) -> None:
        """Keep embedding and head equal, whether the head is stored or not."""
        embedding, head = vocabulary.embedding, vocabulary.head
        for changes in (self.replaced, self.token_rows):
            changed: dict[str, Any] = changes
            if head in changed:
                changed.setdefault(embedding, changed.pop(head))
            if vocabulary.is_stored_twice and embedding in changed:
                changed[head] = changed[embedding]

    def share_new_tokens(self, vocabulary: Vocabulary, shapes: Shapes) -> None:
        """Give embedding and head, tied until now, the same rows where only one of them has those of new tokens.

        PEFT saves the one that has an update, with the rows that both had.
        """
        pair = (vocabulary.embedding, vocabulary.head)
        for name, other in (pair, pair[::-1]):
            whole = self.replaced.get(name)
            if whole is not None and other not in self.replaced and len(whole) != shapes[vocabulary.embedding][0]:
                self.replaced[other] = whole


def stored_changes(adapter: LoraAdapter, names: StoredNames, shapes: Shapes, config: ModelConfig) -> StoredChanges:
    """Return an adapter's changes by the names that the base model's files have.

    What the base does not have keeps its name; see `check_changes`.

    Raises:
        ArtifactError: the adapter does not belong to the base.
        ModelError: the base stores what it changes in another form.
    """
    changes = StoredChanges()
    apart: dict[str, dict[int, Delta]] = defaultdict(dict)
    for name, delta in adapter.deltas.items():
        stored = names.find(name)
        if stored is None and (rows := names.rows(name)) is not None:
            apart[rows.name][rows.part] = delta
            changes.deltas[rows.name] = _joined(rows, apart[rows.name], shapes)
        else:
            changes.deltas[stored or name] = _oriented(delta, name, config)
    for name, experts in adapter.experts.items():
        changes.deltas.update(_expert_deltas(name, experts, names, shapes, config))
    changes.replaced.update({names.find(name) or name: weight for name, weight in adapter.replaced.items()})
    changes.token_rows.update({names.find(name) or name: tokens for name, tokens in adapter.token_rows.items()})
    changes.added.update({names.find(name) or name: vector for name, vector in adapter.added.items()})
    if any(name not in shapes for name in changes.added):
        _add_biases(changes, shapes, config)
    return changes


def _joined(rows: FusedRows, parts: Mapping[int, Delta], shapes: Shapes) -> Delta:
    """Return the update of a stored weight of which several parameters are rows: theirs, each on its own rows."""
    import numpy as np

    if any(delta.magnitude is not None or delta.initial is not None or delta.transposed for delta in parts.values()):
        raise ModelError(
            f"{rows.name}: the base stores several layers in one weight, and their adapter is no plain LoRA",
            "Train a plain LoRA adapter on this base (without DoRA, PiSSA and the like).",
        )
    outputs, inputs = shapes[rows.name]
    height = outputs // rows.parts
    b = np.zeros((outputs, sum(len(delta.a) for delta in parts.values())), np.float32)
    column = 0
    for part, delta in parts.items():
        if delta.shape != (height, inputs):
            raise ArtifactError(f"{rows.name}: the adapter adds {delta.shape} to a part of it", _GIVE_BASE)
        rank = len(delta.a)
        b[part * height : (part + 1) * height, column : column + rank] = delta.b * np.float32(delta.scale)
        column += rank
    return Delta(np.concatenate([delta.a for delta in parts.values()]), b, 1.0, False)


def _oriented(delta: Delta, name: str, config: ModelConfig) -> Delta:
    """GPT-2 stores all weights but its head as [in, out]; the adapter's config has the flag of its last module."""
    if config.model_type != "gpt2" or name.endswith((".wte.weight", ".wpe.weight")):
        return delta
    return replace(delta, transposed=_CONV1D.search(name) is not None)


def _expert_deltas(
    name: str, experts: ExpertDelta, names: StoredNames, shapes: Shapes, config: ModelConfig
) -> dict[str, Delta | ExpertDelta]:
    """Return the updates of all experts of a layer, stored in one weight or one by one."""
    stored = names.find(name)
    if stored is not None:
        shape = shapes[stored][1:]
        swapped = shape == experts.shape[:0:-1]
        if swapped and (shape != experts.shape[1:] or config.model_type in _EXPERTS_IN_OUT):
            experts = replace(experts, transposed=True)
        return {stored: experts}
    pieces = names.pieces(name)
    if not pieces:
        raise ArtifactError(f"the adapter changes {name}, which the base model does not have", _GIVE_BASE)
    count, outputs, _ = experts.shape
    if {piece.expert for piece in pieces} != set(range(count)) or outputs % pieces[0].parts:
        raise ArtifactError(f"{name}: the adapter has {count} experts, the base model another number", _GIVE_BASE)
    return {piece.name: experts.expert(piece.expert, _outputs(piece, outputs)) for piece in pieces}


def _outputs(piece: Piece, outputs: int) -> slice:
    width = outputs // piece.parts
    return slice(piece.part * width, (piece.part + 1) * width)


def _add_biases(changes: StoredChanges, shapes: Shapes, config: ModelConfig) -> None:
    """Give the model biases that it does not have.

    Raises:
        ModelError: its architecture has no place for them.
    """
    missing = {name for name in changes.added if name not in shapes}
    for setting, weights in _BIASES.items() if config.model_type == "llama" else []:
        biases = {
            f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in shapes.items() if weights.fullmatch(name)
        }
        if missing & set(biases):
            changes.new_biases.update(biases)
            changes.settings[setting] = True
            missing -= set(biases)
    if missing:
        raise ModelError(
            f"the adapter was trained with lora_bias, and adds to {min(missing)}, which the base model does not have",
            "Train without lora_bias: this architecture has no place for a bias there.",
        )


def check_changes(changes: StoredChanges, merged: Shapes, base: Shapes, vocabulary: Vocabulary) -> None:
    """Check that changes fit the weights.

    Args:
        changes: of an adapter.
        merged: shapes of the merged model's weights.
        base: shapes of the base's; embedding and head may have other numbers of tokens.
        vocabulary: names of embedding and head.

    Raises:
        ArtifactError: they do not; the adapter belongs to another base.
    """
    for name in (*changes.deltas, *changes.replaced, *changes.added, *changes.token_rows):
        if name not in merged:
            raise ArtifactError(f"the adapter changes {name}, which the base model does not have", _GIVE_BASE)
    for name, delta in changes.deltas.items():
        if delta.shape != merged[name]:
            cause = f"the adapter does not belong to this base model: it adds {delta.shape} to a weight of"
            raise ArtifactError(f"{cause} {merged[name]}", _GIVE_BASE)
        if isinstance(delta, Delta) and delta.initial is Initial.OLORA and delta.transposed:
            raise ModelError(
                f"{name}: OLoRA on a Conv1D layer can't be computed again", "Convert the adapter with peft."
            )
    for name, weight in changes.replaced.items():
        expected = base.get(name, weight.shape)
        resized = name in (vocabulary.embedding, vocabulary.head) and weight.shape[1:] == expected[1:]
        if weight.shape != expected and not resized:
            raise ArtifactError(f"{name}: the adapter has {weight.shape}, the base model {expected}", _GIVE_BASE)
    for name, vector in changes.added.items():
        if vector.shape != merged[name]:
            raise ArtifactError(f"{name}: the adapter has {vector.shape}, the base model {merged[name]}", _GIVE_BASE)
    _check_token_rows(changes, merged, base)


def _check_token_rows(changes: StoredChanges, merged: Shapes, base: Shapes) -> None:
    for name, tokens in changes.token_rows.items():
        new = range(base.get(name, merged[name])[0], merged[name][0])
        if name not in changes.replaced and not {*new} <= {*tokens.indices.tolist()}:
            raise ArtifactError(f"{name}: the adapter has rows of some of the base model's new tokens only", _GIVE_BASE)
        if tokens.values.shape[1:] != merged[name][1:] or (tokens.indices >= merged[name][0]).any():
            raise ArtifactError(f"{name}: the adapter has rows that the base model does not have", _GIVE_BASE)
