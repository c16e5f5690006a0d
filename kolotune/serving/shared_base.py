"""Runs of one base model on one server: it has the base's GGUF once, and adds the adapter of the run that is asked.

The base's GGUF has the tokenizer and the template of the runs, so only runs in which these are equal share one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kolotune.base_models.new_tokens import resolve_base
from kolotune.chats.tokens.trained_template import trained_folder
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.gguf import convert, header
from kolotune.gguf.adapter_file import AdapterObstacle, obstacle, write_adapter
from kolotune.llamacpp.model_server import ServerSettings
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.results import choose_quantization, saved_config
from kolotune.run_folder.source import read_source
from kolotune.weights.adapter_folder import is_adapter
from kolotune.weights.merge import MergedModel, companion_files

from .base_gguf import quantized
from .served_model import RunningServer, ServedModel, SharedServer, server_settings

_ALIAS = "shared-base-model"
_DIGITS = 32  # of hashes that name folders


@dataclass(frozen=True)
class AdaptedBase:
    """A run's model as two GGUFs: its base, as other runs may have it, and its adapter."""

    base: Path
    adapter: Path


def open_models(
    runs: Sequence[RunFolder],
    quantization: str | None,
    parallel: int,
    reporter: Reporter,
    opened: contextlib.ExitStack,
) -> list[ServedModel]:
    """Open runs so that those of one base model share a server; the others get one each, and it is reported why.

    Args:
        runs: the run folders.
        quantization, parallel: as for `ServedModel`.
        reporter: shows what is converted first, and which runs share nothing.
        opened: closes the models.

    Raises:
        KolotuneError: a result or a base model is missing, or can't be converted or loaded.
    """
    groups: dict[tuple[Path, ServerSettings], list[tuple[RunFolder, Path]]] = defaultdict(list)
    for run in runs:
        adapted = adapted_base(run, quantization, reporter)
        if isinstance(adapted, AdapterObstacle):
            reporter.note(f"{run.root.name} has a server of its own: {adapted.value}")
        else:
            settings = replace(server_settings(run, quantization, parallel), name=_ALIAS, embeds=False)
            groups[adapted.base, settings].append((run, adapted.adapter))
    shared: dict[RunFolder, SharedServer] = {}
    for (base, settings), members in groups.items():
        if len(members) < 2:
            reporter.note(f"{members[0][0].root.name} has a server of its own: no other run has its base and tokenizer")
            continue
        adapters = tuple(str(adapter) for _, adapter in members)
        running = RunningServer(base, replace(settings, adapters=adapters))
        opened.callback(running.close)
        for number, (run, _) in enumerate(members):
            shared[run] = SharedServer(running, number, len(members), _ALIAS)
    return [opened.enter_context(ServedModel(run, quantization, parallel, shared.get(run))) for run in runs]


def adapted_base(run: RunFolder, quantization: str | None, reporter: Reporter) -> AdaptedBase | AdapterObstacle:
    """Return the base model of a run and its adapter as GGUFs, which are made once and kept in the cache.

    Args:
        run: the run folder.
        quantization: of the base; "none" for an unquantized one; None: the run's first.
        reporter: shows what is converted.

    Raises:
        KolotuneError: the base model or the adapter is missing, or can't be converted.
    """
    config, folder = saved_config(run), read_source(run) or run.adapter
    if not is_adapter(folder):
        return AdapterObstacle.NO_ADAPTER
    digest = _verified(run, folder)
    base, tokenizer, log = resolve_base(config, reporter), trained_folder(run), run.log("base")
    model, name = MergedModel(folder, base, config.merge_dtype), run.merged_model.name
    plan = convert.plan_without_adapter(
        base, tokenizer, dtype=config.merge_dtype, name=name, log=log, reporter=reporter
    )
    problem = obstacle(model, plan)
    if plan is None or problem is not AdapterObstacle.NONE:
        return problem
    plain = _cached(base, tokenizer, config.merge_dtype) / "Base.gguf"
    adapter = plain.with_name(f"adapter-{digest[:_DIGITS]}.gguf")
    plain.parent.mkdir(parents=True, exist_ok=True)
    if not plain.is_file():
        reporter.doing(f"converting {config.base_model}, once")
        convert.convert_adapter(
            None, base, tokenizer, dtype=config.merge_dtype, name=name, target=plain, log=log, reporter=reporter
        )
    if not adapter.is_file():
        write_adapter(model, plan, str(header.read(plain).fields["general.architecture"]), adapter)
    return AdaptedBase(quantized(plain, run, config, choose_quantization(config, quantization), reporter), adapter)


def _verified(run: RunFolder, adapter: Path) -> str:
    """Return the hash of a run's adapter, which has to be the one in the run's GGUF."""
    digest = Hasher().of(adapter)
    records = [read_record(run, stage) for stage in ("merge", "convert", "quantize")]
    if digest not in {record.inputs.get("the adapter") for record in records if record is not None}:
        raise ArtifactError(
            f"{adapter}: is not the adapter in the run's GGUF", "Run `kolotune merge` and what follows."
        )
    return digest


def _cached(base: Path, tokenizer: Path, dtype: str) -> Path:
    """Return the folder in the cache for a base model with a tokenizer."""
    digest = hashlib.sha256(f"{Hasher().of(base)}\0{dtype}\0".encode())
    for name, path in sorted(companion_files(base, tokenizer).items()):
        digest.update(f"{name}\0{Hasher().of(path)}\0".encode())
    return cache_folder("base_ggufs") / digest.hexdigest()[:_DIGITS]
