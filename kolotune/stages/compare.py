"""compare: is each thing on the road still the model that was trained? Measured, judged, and written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kolotune import llamacpp
from kolotune.fidelity import figures, judge, tasks
from kolotune.fidelity.comparison import Comparison
from kolotune.fidelity.judge import F16, MERGED, Evidence, MeasuredFile
from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config, as_record
from kolotune.foundation.errors import ArtifactError, FidelityError, ModelError
from kolotune.foundation.files import remove, size_of, write_json
from kolotune.foundation.quantization_types import NONE
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf import convert, quantize
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import held_out_losses, kept_held_out_loss, read_metrics
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local
from kolotune.weights.model_config import read_model_config

NAME = "compare"
DOING = "comparing what was made with what was trained"
_OPTIONS = (
    "compare_chats", "compare_length", "compare_answers", "compare_prompt", "quantization", "system", "merge_dtype",
)  # fmt: skip
_LONGEST_ANSWER = 96


def options(config: Config) -> JsonObject:
    """See `records.Stage`; what is tried is there when anything is."""
    tried = as_record(config, ("compare_quantization", "importance_matrix")) if _to_try(config) else {}
    return as_record(config, _OPTIONS) | tried


def _to_try(config: Config) -> list[str]:
    """The quantizations that are measured and that the run does not have."""
    return [name for name in config.compare_quantization if name not in config.quantization]


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    run = context.run
    found = {
        "the prepared chats": run.prepared,
        "the base model": context.base,
        "the adapter": run.adapter,
        "the merged model": run.merged_model,
        "what training measured": run.metrics,
    }
    for name, gguf, modelfile in _ggufs(context):
        found |= {f"the {name}": gguf, f"the Modelfile of the {name}": modelfile}
    return found


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    return [context.run.comparison]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("torch", "transformers", "llama-cpp-python")


def preflight(context: Context, reporter: Reporter) -> None:
    """What is only tried has to be possible too.

    Raises:
        ConfigError: the model's rows do not fit a quantization.
    """
    if _to_try(context.config):
        llamacpp.ensure(reporter)
        quantize.check_blocks(context.base, _to_try(context.config))


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Measures and judges; writes the comparison in any case.

    Raises:
        FidelityError: a stage fails its bound; the comparison says which.
        ArtifactError: there is nothing to compare.
    """
    if context.source is not None or not context.run.adapter.is_dir() or not context.run.prepared.is_dir():
        raise ArtifactError(
            f"{context.run.root}: has no chats and adapter of its own to compare with",
            "Only runs that were trained here can be compared.",
        )
    with _scratch(context.run) as scratch:
        comparison = judge.verdict(_evidence(context, scratch, reporter))
    write_json(context.run.comparison, comparison.as_json())
    if comparison.failure is not None:
        failure = comparison.failure
        raise FidelityError(
            f"{failure.stage}: {failure.what}",
            f"Likely cause: {failure.likely_cause}.",
        )
    return _facts(comparison)


def _facts(comparison: Comparison) -> dict[str, Any]:
    return {"chats": comparison.chats, "base_loss": comparison.base_loss, "tuned_loss": comparison.tuned_loss}


@contextmanager
def _scratch(run: RunFolder) -> Iterator[Path]:
    """A folder for log-probabilities; what a killed process left there is removed first."""
    remove(run.comparing)
    run.comparing.mkdir(parents=True)
    try:
        yield run.comparing
    finally:
        remove(run.comparing)


def _ggufs(context: Context) -> Iterator[tuple[str, Path, Path]]:
    """Name, GGUF and Modelfile, the unquantized one first."""
    run = context.run
    yield F16, run.gguf, run.modelfile()
    for name in context.config.quantization:
        if name != NONE:
            yield name, run.quantized(name), run.modelfile(name)


def _evidence(context: Context, scratch: Path, reporter: Reporter) -> Evidence:
    run, config = context.run, context.config
    not_kept = []
    merged = None
    if run.merged_model.is_dir():
        merged = MeasuredFile(MERGED, run.relative(run.merged_model), size_of(run.merged_model))
    else:
        not_kept.append(MERGED)
    reference = _reference(context, scratch, reporter)
    before = scratch / (figures.MERGED if (scratch / figures.MERGED).is_file() else figures.TUNED)
    measured = []
    for name, gguf, modelfile in _ggufs(context):
        if not gguf.is_file():
            if name != F16:
                raise ArtifactError(f"{gguf}: there is no such GGUF", "Run `kolotune quantize` first.")
            not_kept.append(F16)
            continue
        reporter.doing(f"comparing the {name}")
        after = scratch / f"{name}.npy"
        answer = _measure_gguf(context, scratch, name, gguf, modelfile, before, after)
        if name == F16 and after.is_file():
            before = after
        else:
            remove(after)
        made = MeasuredFile(name, run.relative(gguf), gguf.stat().st_size)
        measured.append((made, run.relative(modelfile), answer))
    return Evidence(
        reference=reference,
        merged=merged,
        ggufs=measured,
        merge_dtype=config.merge_dtype,
        load_in_4bit=config.load_in_4bit,
        adapter=MeasuredFile(judge.ADAPTER, run.relative(run.adapter), size_of(run.adapter)),
        recorded=_recorded(run, config) if reference.held_out else None,
        not_kept=tuple(not_kept),
        untied=merged is not None and _tied(context.base) and not _tied(run.merged_model),
        tried=tuple(_tried(context, scratch, before, reporter)),
        weighted=frozenset(
            quantize.with_matrix(context, [*config.quantization, *_to_try(config)]),
        ),
    )


def _tried(
    context: Context, scratch: Path, before: Path, reporter: Reporter
) -> Iterator[tuple[MeasuredFile, tasks.GgufMeasurement]]:
    """Makes each quantization that is only tried, measures and removes it: one at a time is on the disk."""
    run, names = context.run, _to_try(context.config)
    if not names:
        return
    source, log = run.gguf, run.log(NAME)
    if not source.is_file():
        reporter.doing("converting to GGUF, for as long as quantizations are tried")
        source = scratch / run.gguf.name
        convert.make_gguf(context, source, log, reporter)
    weighted = quantize.with_matrix(context, names)
    matrix = quantize.matrix_for(context, source, scratch / run.importance_matrix.name, log, reporter, weighted)
    for name in names:
        reporter.doing(f"trying {name}")
        target = scratch / run.quantized(name).name
        quantize.quantize_file(source, target, name, log, reporter, matrix if name in weighted else None)
        after = scratch / f"{name}.npy"
        answer = _measure_gguf(context, scratch, name, target, None, before, after)
        yield MeasuredFile(name, "", target.stat().st_size), answer
        remove(target)
        remove(after)


def _tied(model: Path) -> bool:
    try:
        return read_model_config(model).ties_embeddings
    except ModelError:
        return False


def _reference(context: Context, scratch: Path, reporter: Reporter) -> tasks.Reference:
    """What is computed with transformers."""
    run, config = context.run, context.config
    held_out = (run.prepared / "held_out.safetensors").is_file()
    asked = tasks.ModelsTask(
        base=str(context.base),
        adapter=str(run.adapter),
        merged=str(run.merged_model) if run.merged_model.is_dir() else "",
        tokenizer=str(run.tokenizer),
        tokens=str(run.prepared / ("held_out.safetensors" if held_out else "train.safetensors")),
        chats_file=str(run.prepared / "held_out.jsonl") if held_out else "",
        train_data=[str(each) for each in config.train_data],
        most_chats=config.compare_chats,
        most_tokens=config.compare_length,
        own_prompts=list(config.compare_prompt),
        system=config.system or "",
        most_answers=config.compare_answers,
        longest_answer=_LONGEST_ANSWER,
        scratch=str(scratch),
    )
    typed_storage.write(scratch / "models.json", asked)
    _in_a_process(run, "models", scratch / "models.json", reporter)
    return typed_storage.read(tasks.Reference, scratch / figures.REFERENCE)


def _measure_gguf(
    context: Context, scratch: Path, name: str, gguf: Path, modelfile: Path | None, before: Path, after: Path
) -> tasks.GgufMeasurement:
    asked = tasks.GgufTask(
        gguf=str(gguf),
        modelfile=str(modelfile or ""),
        reference=str(scratch / figures.REFERENCE),
        before=str(before),
        after=str(after),
        system=context.config.system or "",
        longest_answer=_LONGEST_ANSWER,
        answer_file=str(scratch / f"{name}.answer.json"),
    )
    typed_storage.write(scratch / f"{name}.json", asked)
    try:
        _in_a_process(context.run, "gguf", scratch / f"{name}.json", None)
    except _ProcessDied as died:
        # llama.cpp ends the process on files that it does not expect.
        return tasks.GgufMeasurement(tasks.Figures(wrong=[f"llama.cpp fails on the file: {died.cause}"]))
    return typed_storage.read(tasks.GgufMeasurement, Path(asked.answer_file))


class _ProcessDied(ArtifactError):
    """A measuring process ended without an answer."""


def _in_a_process(run: RunFolder, kind: str, file: Path, reporter: Reporter | None) -> None:
    """Measure in a child process; raise its errors."""

    def on_event(name: str, fields: JsonObject) -> None:
        if name == "doing" and reporter is not None:
            reporter.doing(f"comparing {fields['text']}")

    log = run.log(NAME)
    code = child_process.run(
        "kolotune.fidelity",
        kind,
        str(file),
        log=log,
        otherwise=ArtifactError,
        on_event=on_event,
        env={"TOKENIZERS_PARALLELISM": "false"},
    )
    if code != 0:
        raise _ProcessDied(f"measuring ended with code {code}: {local.last_lines(log)}", f"The log is {log}.")


def _recorded(run: RunFolder, config: Config) -> tuple[float, float] | None:
    """The held-out losses of the base and of what was kept, as training measured them; None when it did not."""
    if not run.metrics.is_file():
        return None
    losses = held_out_losses(read_metrics(run.metrics, skip_damaged=True))
    if not losses or losses[0][0] != 0:
        return None
    return losses[0][1], kept_held_out_loss(losses, early_stopping=bool(config.early_stopping))
