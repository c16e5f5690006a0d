"""Before training: does llama.cpp compute this model as transformers does?

See `computation_proof`. What it found is kept in the cache, for the settings of the model alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from kolotune import llamacpp
from kolotune.engines.exact_model import reason_unsupported
from kolotune.foundation import shared_libraries, typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ModelError, ToolchainError
from kolotune.foundation.files import remove
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf import plan_cache
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local
from kolotune.weights.model_config import ModelConfig, read_model_config
from kolotune.weights.shrunk_config import reach, shrink

from .computation_proof import ComputationProof, ComputationTask, FailedSide

_VERSION = 5  # raised when the way to compare changes
_MOST_PROOFS = 64
_EQUAL = 1e-5  # mean KL; equal models are below 1e-6
_WRONG = 1e-3  # what `compare` refuses
_SAME = 1e-7  # mean KL of two ways to compute in fp32
_HINT = "Use a base model of another architecture. With --no-compare it is trained nevertheless."


class Verdict(StrEnum):
    """What a proof means for a run."""

    EQUAL = "equal"
    LONG_CHATS = "equal up to a length"
    NEARLY = "nearly equal"
    DIFFERENT = "different"
    NOT_COMPUTED = "llama.cpp can't compute it"
    NOT_MERGED = "its adapters can't be merged"
    NOT_COMPARED = "not compared"


def judge(proof: ComputationProof, config: ModelConfig) -> Verdict:
    """Return what a proof means for a model."""
    if proof.divergence is None or proof.divergence_within is None:
        verdicts = {FailedSide.LLAMACPP: Verdict.NOT_COMPUTED, FailedSide.MERGE: Verdict.NOT_MERGED}
        return verdicts.get(proof.obstacle, Verdict.NOT_COMPARED) if proof.obstacle else Verdict.NOT_COMPARED
    if proof.divergence <= _EQUAL:
        return Verdict.EQUAL
    if proof.divergence <= _WRONG or (proof.divergence_median is not None and proof.divergence_median <= _EQUAL):
        return Verdict.NEARLY
    is_within_equal = proof.divergence_within <= _EQUAL and reach(config.values) is not None
    return Verdict.LONG_CHATS if is_within_equal else Verdict.DIFFERENT


def describe(proof: ComputationProof, config: ModelConfig) -> str:
    """Return one sentence on what differs; "" where nothing does."""
    name = config.architectures[0] if config.architectures else config.model_type
    match judge(proof, config):
        case Verdict.EQUAL:
            return ""
        case Verdict.LONG_CHATS:
            return (
                f"llama.cpp computes {name} otherwise than it is trained in chats of more than "
                f"{reach(config.values)} tokens: it has no such sliding window or scaling"
            )
        case Verdict.NOT_COMPUTED:
            return f"llama.cpp can't compute a small {name}: {proof.reason}"
        case Verdict.NOT_MERGED:
            return f"adapters on {name} can't be merged: {proof.reason}"
        case Verdict.NOT_COMPARED:
            return f"not compared before training: no small {name} can be made: {proof.reason}"
        case _:
            return f"llama.cpp computes {name} otherwise than transformers: mean KL {proof.divergence:.1e}"


def check_computation(context: Context, reporter: Reporter) -> None:
    """Check that llama.cpp computes the base model's architecture as training does; warn where it nearly does.

    Nothing is checked with a converter of the user's own, without the comparison, or for what is no plain language
    model.

    Raises:
        ToolchainError: it computes something else.
        ModelError: what is trained can't be merged.
    """
    config, proof = read_model_config(context.base), find_run_proof(context, reporter)
    if proof is None:
        return
    sentence, length, most = describe(proof, config), reach(config.values), context.config.max_seq_length
    match judge(proof, config):
        case Verdict.DIFFERENT | Verdict.NOT_COMPUTED:
            raise ToolchainError(sentence, _HINT)
        case Verdict.NOT_MERGED:
            raise ModelError(sentence, "Use a base model of another architecture.")
        case Verdict.LONG_CHATS if most is not None and length is not None and most <= length:
            pass
        case Verdict.LONG_CHATS:
            reporter.warning(f"{sentence}. --max-seq-length {length} keeps to what both compute")
        case Verdict.NEARLY:
            reporter.warning(sentence)
        case Verdict.NOT_COMPARED:
            reporter.note(sentence)


def find_run_proof(context: Context, reporter: Reporter) -> ComputationProof | None:
    """Return what `check_computation` judges, from the cache if nothing has changed; None where nothing is checked."""
    config = read_model_config(context.base)
    if not context.config.compare or "text_config" in config.values:
        return None
    toolchain = llamacpp.ensure(reporter)
    if toolchain.version == "own":
        return None
    return find_proof(config, toolchain, context.run.log("computation"), reporter)


def proves_packed(context: Context, reporter: Reporter) -> bool:
    """Return whether the packed passes compute the base as transformers does, on a small model of its settings."""
    config = read_model_config(context.base)
    if reason_unsupported(context.base, 0) or "text_config" in config.values:
        return False
    toolchain = llamacpp.ensure(reporter)
    if toolchain.version == "own":
        return False
    packed = find_proof(config, toolchain, context.run.log("computation"), reporter).packed
    return packed is not None and packed <= _SAME


def find_proof(config: ModelConfig, toolchain: llamacpp.Toolchain, log: Path, reporter: Reporter) -> ComputationProof:
    """Return how far apart the two are for a model's settings, from the cache if nothing has changed."""
    shrunk = shrink(config.values)
    file = cache_folder("computations") / f"{_key(shrunk, toolchain)}.json"
    known = typed_storage.read_or_none(ComputationProof, file)
    if known is not None:
        return known
    reporter.doing("comparing transformers with llama.cpp on a small model")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        typed_storage.write(task, ComputationTask(shrunk, str(toolchain.root), str(answer)))
        proof = _run(task, answer, log)
        if answer.exists():  # else the process died, perhaps for want of memory
            typed_storage.write(file, proof)
    _remove_old(file)
    return proof


def _run(task: Path, answer: Path, log: Path) -> ComputationProof:
    seen: list[str] = []
    code = child_process.run(
        "kolotune.fidelity",
        "computation",
        str(task),
        log=log,
        otherwise=ToolchainError,
        on_event=lambda name, _: seen.append(name),
        env=plan_cache.OFFLINE,
    )
    if code == 0:
        return typed_storage.read(ComputationProof, answer)
    obstacle = FailedSide.LLAMACPP if "loading" in seen else FailedSide.TRANSFORMERS
    return ComputationProof(obstacle=obstacle, reason=f"the process ended with code {code}: {local.last_lines(log)}")


def _key(shrunk: JsonObject, toolchain: llamacpp.Toolchain) -> str:
    versions = [_VERSION, importlib.metadata.version("transformers"), toolchain.version, shared_libraries.find().origin]
    return hashlib.sha256(json.dumps([*versions, shrunk], sort_keys=True).encode()).hexdigest()[:32]


def _remove_old(newest: Path) -> None:
    older = sorted((path for path in newest.parent.iterdir() if path != newest), key=lambda path: path.stat().st_mtime)
    for path in older[: 1 - _MOST_PROOFS]:
        with suppress(OSError):
            remove(path)
