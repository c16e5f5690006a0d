"""A run's base model as a GGUF, to be asked the same as the tuned model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kolotune.base_models.new_tokens import resolve_base
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.foundation.quantization_types import NEEDS_IMPORTANCE_MATRIX, NONE, is_made_with_matrix
from kolotune.foundation.reporter import Reporter
from kolotune.gguf import convert, quantize
from kolotune.gguf.budgets import read_mixtures
from kolotune.run_folder.layout import RunFolder
from kolotune.weights.adapter_folder import is_adapter


def base_gguf(run: RunFolder, config: Config, name: str, reporter: Reporter) -> Path:
    """Return the base model as a GGUF; it is made once and kept in the cache.

    Args:
        run: its importance matrix is used where the run's own quantization is made with one.
        config: the options of the run.
        name: the quantization; "none" for the unquantized GGUF.
        reporter: shows when the base model has to be converted first.

    Raises:
        ConfigError: the run's base model is an adapter.
        ArtifactError: the quantization needs an importance matrix, and the run has none yet.
    """
    base = resolve_base(config, reporter)
    if is_adapter(base):
        raise ConfigError(f"{base}: is an adapter, not a base model", "Name the base model itself.")
    folder = cache_folder("base_ggufs") / Hasher().of(base)[:32]
    plain = folder / "Base.gguf"
    if not plain.is_file():
        reporter.doing(f"converting {config.base_model}, once")
        convert.convert_folder(base, plain, run.log("base"), reporter, exact=False)
    return quantized(plain, run, config, name, reporter)


def quantized(plain: Path, run: RunFolder, config: Config, name: str, reporter: Reporter) -> Path:
    """Return a quantization of a base model's GGUF in the cache; it is made once.

    Args:
        plain: the unquantized GGUF, which is returned for "none".
        run, config, name, reporter: as for `base_gguf`.

    Raises:
        ArtifactError: the quantization needs an importance matrix, and the run has none yet.
    """
    if name == NONE:
        return plain
    matrix = run.importance_matrix if is_made_with_matrix(name, config.importance_matrix) else None
    if matrix is not None and not matrix.is_file():
        if name in NEEDS_IMPORTANCE_MATRIX:
            raise ArtifactError(f"{matrix}: there is no importance matrix", "Run `kolotune quantize` first.")
        matrix = None  # an exported model was trained elsewhere
    types = _chosen_types(run, name) if read_budget(name) is not None else None
    made_with = [file for file in (matrix, run.tensor_types if types else None) if file is not None]
    target = plain.with_name("-".join([f"Base{name}", *(Hasher().of(file)[:16] for file in made_with)]) + ".gguf")
    if not target.is_file():
        quantize.quantize_file(plain, target, name, run.log("base"), reporter, matrix, types=types)
    return target


def _chosen_types(run: RunFolder, name: str) -> Mapping[str, str]:
    mixtures = read_mixtures(run)
    if mixtures is None or name not in mixtures.chosen:
        raise ArtifactError(f"{run.tensor_types}: has no types for {name}", "Run `kolotune quantize` first.")
    return mixtures.chosen[name].types
