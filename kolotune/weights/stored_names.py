"""By what names a base model's files hold what an adapter changes.

An adapter has the names of modules, as transformers has them. Files often have others: transformers 5 holds all experts
of a layer in one parameter, files each expert; a router, or all of a composite model, has another name. What becomes of
the stored weights when such a model is loaded is asked of transformers, with a model that takes no memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_EXPERT = re.compile(r".*\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A stored weight that is a part of a model's parameter.

    Attributes:
        name: of the stored weight.
        expert: its place in the parameter's first dimension.
        part, parts: its place in the second dimension, and how many weights lie there side by side.
    """

    name: str
    expert: int
    part: int
    parts: int


@dataclass(frozen=True)
class FusedRows:
    """A parameter that is a part of a stored weight: one of several of the same number of rows, end to end.

    Attributes:
        name: of the stored weight.
        part, parts: the parameter's place in it, and how many there are.
    """

    name: str
    part: int
    parts: int


class StoredNames:
    """The names of the weights in a base model's files.

    Args:
        folder: of the base model.
        names: of its weights.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._folder = folder
        self._names = names

    def find(self, name: str) -> str | None:
        """Return the stored name of a parameter that is stored as it is; some bases lack the outer module's name."""
        spellings = (name, name.removeprefix("model."), f"model.{name}", name.removeprefix("transformer."))
        spelling = next((spelling for spelling in spellings if spelling in self._names), None)
        if spelling is not None:
            return spelling
        pieces = self._loaded.get(name, [])
        return pieces[0] if len(pieces) == 1 and isinstance(pieces[0], str) else None

    def pieces(self, name: str) -> list[Piece]:
        """Return the stored weights that make up a parameter; [] if it is none, or not made up of whole weights."""
        pieces = [piece for piece in self._loaded.get(name, []) if isinstance(piece, Piece)]
        return pieces if len(pieces) == len(self._loaded.get(name, [])) else []

    def rows(self, name: str) -> FusedRows | None:
        """Return the stored weight that has a parameter as some of its rows, if any."""
        pieces = self._loaded.get(name, [])
        return pieces[0] if len(pieces) == 1 and isinstance(pieces[0], FusedRows) else None

    @cached_property
    def _loaded(self) -> dict[str, list[_Stored]]:
        """What transformers makes of the stored weights, by the names of the model's parameters."""
        loaded: dict[str, list[_Stored]] = defaultdict(list)
        for model in _models(self._folder):
            for parameter, piece in _loading(model, self._names):
                loaded[parameter].append(piece)
        return loaded


def _models(folder: Path) -> Iterator[Any]:
    """Yield the models that transformers makes of a folder: the one that its config names, and the language model."""
    import torch
    import transformers

    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError):
        return
    named = getattr(library, next(iter(config.architectures or []), ""), None)
    seen = set()
    for make in (getattr(named, "_from_config", None), library.AutoModelForCausalLM.from_config):
        try:
            with torch.device("meta"):
                model = make(config) if make is not None else None
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            continue
        if model is not None and type(model) not in seen:
            seen.add(type(model))
            yield model


_Stored = str | Piece | FusedRows | None


def _loading(model: Any, names: Iterable[str]) -> Iterator[tuple[str, _Stored]]:
    """Yield the parameters that each stored weight becomes or is a piece of; None for a piece that is changed, too."""
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    for name in names:
        parameter, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if parameter in parameters and pattern is None:
            yield parameter, name
        elif parameter in parameters and pattern is not None:
            converter = by_pattern[pattern]
            chunks = _chunks(name, parameter, converter, loading)
            if chunks:
                yield from chunks
            else:
                yield parameter, _piece(name, pattern, converter, loading)


def _chunks(name: str, parameter: str, converter: Any, loading: Any) -> list[tuple[str, FusedRows]]:
    """Return the parameters that a stored weight is cut into, of which `parameter` is the first; [] if it is not."""
    operations, targets = converter.operations, list(converter.target_patterns)
    if [type(operation) for operation in operations] != [loading.Chunk] or operations[0].dim != 0 or len(targets) < 2:
        return []
    before, first, after = parameter.rpartition(targets[0])
    if not first:
        return []
    return [(f"{before}{target}{after}", FusedRows(name, part, len(targets))) for part, target in enumerate(targets)]


def _piece(name: str, pattern: str, converter: Any, loading: Any) -> Piece | None:
    kinds = [type(operation) for operation in converter.operations]
    dimensions = [operation.dim for operation in converter.operations if hasattr(operation, "dim")]
    expert = _EXPERT.match(name)
    if expert is None:
        return None
    if kinds == [loading.MergeModulelist] and dimensions == [0]:
        return Piece(name, int(expert[1]), 0, 1)
    if kinds == [loading.MergeModulelist, loading.Concatenate] and dimensions == [0, 1]:
        patterns = list(converter.source_patterns)
        return Piece(name, int(expert[1]), patterns.index(pattern), len(patterns))
    return None
