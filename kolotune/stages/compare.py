"""compare: is every result still the model that was trained? Measure, judge, write it down."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kolotune import llamacpp
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.fidelity import computation_gate, gain, judge, tasks
from kolotune.fidelity.adapter_place import GgufPlace
from kolotune.fidelity.defects import DefectKind, defect
from kolotune.fidelity.evidence import ADAPTER, F16, MERGED, MODEL, Evidence, MeasuredFile, MeasuredGguf
from kolotune.fidelity.prompt_gate import recorded_traits
from kolotune.foundation import hardware, typed_storage
from kolotune.foundation.config import Config, plain_values, stage_options
from kolotune.foundation.errors import ArtifactError, FidelityError, ModelError
from kolotune.foundation.files import remove, size_of
from kolotune.foundation.ordered_tasks import results_in_order
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.foundation.quantization_types import NONE
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf import conversion_source, quantize, run_matrix
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS, RunFolder
from kolotune.run_folder.metrics import answer_losses, read_metrics
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local
from kolotune.weights.adapter_folder import is_adapter
from kolotune.weights.model_config import read_model_config
from kolotune.weights.stored_blocks import has_blocks

NAME = "compare"
_CONVERT = "convert"  # the stage whose record holds the type of the unquantized GGUF
DOING = "comparing what was made with what was trained"
_LONGEST_ANSWER = 96  # tokens
_GENERAL_TOKENS = {"off": 0, "loss": 1024, "full": 1 << 20}  # of the general set's prose, by what is asked for
_TOGETHER = 2  # GGUFs that are measured side by side
_MEMORY_SHARE = 0.5  # of the free memory that their files may fill
_ONE_NUMPY_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""For GGUFs, which are measured side by side: more threads would wait 8 ms for each other at products of 0.3 ms."""
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For the reference: glibc's allocator would return memory after each layer and get it back, zeroed, for the next."""
_LARGER = ("Q6_K", "Q8_0")  # tried where a quantization loses what training gained


def options(config: Config) -> JsonObject:
    trials = plain_values(config, ("compare_quantization", "importance_matrix")) if _trial_quantizations(config) else {}
    return stage_options(config, NAME) | trials


def inputs(context: Context) -> dict[str, Path]:
    run = context.run
    paths = {"the base model": context.base, "the merged model": run.merged_model}
    if context.source is None:
        paths |= {
            "the prepared chats": run.prepared, "the adapter": run.adapter, "what training measured": run.metrics
        }  # fmt: skip
    else:
        paths["what is exported"] = context.source
    for name, gguf, modelfile in _ggufs(context):
        paths |= {f"the {name}": gguf, f"the Modelfile of the {name}": modelfile}
    return paths


def outputs(context: Context) -> list[Path]:
    return [context.run.comparison]


def packages() -> Sequence[str]:
    return ("torch", "transformers", "xllamacpp")


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that quantizations that are made only to be measured are possible.

    Raises:
        ConfigError: the model's rows do not fit a quantization.
    """
    trials = _trial_quantizations(context.config)
    if trials:
        llamacpp.ensure(reporter)
        quantize.check_blocks(context.base, trials)
        if any(read_budget(name) is not None for name in trials):
            conversion_source.check_budgets(context, trials, context.run.log(NAME), reporter)


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Measure and judge; write the comparison whatever the verdict.

    Raises:
        FidelityError: a stage fails its bound; the comparison says which.
        ArtifactError: there is nothing to compare.
    """
    has_own = context.run.adapter.is_dir() and context.run.prepared.is_dir()
    if context.source is None and not has_own:
        raise ArtifactError(
            f"{context.run.root}: has no chats and adapter of its own to compare with", "Run `kolotune run` again."
        )
    with _scratch_folder(context.run) as scratch:
        comparison = judge.judge(_gather_evidence(context, scratch, reporter))
    record = read_record(context.run, _CONVERT)
    if record is not None and isinstance(gguf_type := record.facts.get("type"), str):
        comparison = comparison.with_type(gguf_type)
    comparison.write(context.run.comparison)
    failure = comparison.failure
    if failure is not None:
        raise FidelityError(f"{failure.stage}: {failure.what}", f"Likely cause: {failure.likely_cause}.")
    return {"chats": comparison.chats, "base_loss": comparison.base_loss, "tuned_loss": comparison.tuned_loss}


def _trial_quantizations(config: Config) -> list[str]:
    """Return the quantizations that are measured and that the run does not keep."""
    return [name for name in config.compare_quantization if name not in config.quantization]


@contextmanager
def _scratch_folder(run: RunFolder) -> Iterator[Path]:
    """Provide a folder for log-probabilities; a killed process may have left files there."""
    remove(run.comparing)
    run.comparing.mkdir(parents=True)
    try:
        yield run.comparing
    finally:
        remove(run.comparing)


def _ggufs(context: Context) -> Iterator[tuple[str, Path, Path]]:
    """Yield name, GGUF and Modelfile of the run's models, the unquantized one first."""
    run = context.run
    yield F16, run.gguf, run.modelfile()
    for name in context.config.quantization:
        if name != NONE:
            yield name, run.quantized(name), run.modelfile(name)


def _gather_evidence(context: Context, scratch: Path, reporter: Reporter) -> Evidence:
    run, config = context.run, context.config
    not_kept = []
    merged = None
    if run.merged_model.is_dir():
        merged = MeasuredFile(MERGED, run.relative(run.merged_model), size_of(run.merged_model))
    elif _has_adapter(context):
        not_kept.append(MERGED)
    reference = _measure_reference(context, scratch, reporter)
    before = scratch / (tasks.MERGED_FILE if (scratch / tasks.MERGED_FILE).is_file() else tasks.TUNED_FILE)
    if not run.gguf.is_file():
        not_kept.append(F16)
    measured = list(_measure_ggufs(context, scratch, before, reporter))
    if (scratch / f"{F16}.npy").is_file():
        before = scratch / f"{F16}.npy"
    evidence = Evidence(
        reference=reference,
        merged=merged,
        ggufs=measured,
        merge_dtype=config.merge_dtype,
        load_in_4bit=config.load_in_4bit and not has_blocks(context.base),  # blocks are the base's own weights
        adapter=_measured_reference(context),
        recorded=_recorded_losses(run, config) if reference.held_out else None,
        not_kept=tuple(not_kept),
        untied=merged is not None and _ties_embeddings(context.base) and not _ties_embeddings(run.merged_model),
        trials=tuple(_measure_trials(context, scratch, before, reporter, _trial_quantizations(config))),
        with_matrix=frozenset(
            run_matrix.with_matrix(context, [*config.quantization, *_trial_quantizations(config), *_LARGER])
        ),
        is_export=context.source is not None,
    )
    return _with_keeping(context, scratch, before, reporter, evidence)


def _measure_ggufs(context: Context, scratch: Path, before: Path, reporter: Reporter) -> Iterator[MeasuredGguf]:
    """Measure the GGUFs of the run, the unquantized one first if it is kept; side by side where memory allows it.

    One thread each is faster than all threads for one after another: they never wait for each other, and what a process
    does alone, such as loading its file, takes no core away.
    """
    ggufs = [(name, gguf, modelfile) for name, gguf, modelfile in _ggufs(context) if gguf.is_file() or name != F16]
    for _, gguf, _ in ggufs:
        if not gguf.is_file():
            raise ArtifactError(f"{gguf}: there is no such GGUF", "Run `kolotune quantize` first.")
    largest = sorted((gguf.stat().st_size for _, gguf, _ in ggufs), reverse=True)[:_TOGETHER]
    together = _TOGETHER if sum(largest) < hardware.free_on("cpu") * _MEMORY_SHARE else 1
    together = min(together, hardware.cores(), len(ggufs))
    reporter.doing(f"comparing the {' and the '.join(name for name, *_ in ggufs)}")

    def measure(name: str, gguf: Path, modelfile: Path) -> MeasuredGguf:
        after = scratch / f"{name}.npy"
        is_later = name != F16 and ggufs[0][0] == F16
        threads = hardware.cores() // together if together > 1 else 0
        others = [str(_answer_file(scratch, other)) for other, *_ in ggufs if other != name] if threads else []
        measurement = _measure_gguf(context, scratch, name, gguf, modelfile, before, after, is_later, threads, others)
        if name != F16:
            remove(after)
        file = MeasuredFile(name, context.run.relative(gguf), gguf.stat().st_size)
        return MeasuredGguf(file, context.run.relative(modelfile), measurement)

    with ThreadPoolExecutor(max(together, 1)) as threads:  # they wait for processes
        yield from results_in_order(threads, (partial(measure, *each) for each in ggufs), together)


def _has_adapter(context: Context) -> bool:
    return context.source is None or is_adapter(context.source)


def _measured_reference(context: Context) -> MeasuredFile:
    """Return the adapter of the run, or what is exported, as the file of the reference."""
    run, source = context.run, context.source
    if source is None:
        return MeasuredFile(ADAPTER, run.relative(run.adapter), size_of(run.adapter))
    return MeasuredFile(ADAPTER if is_adapter(source) else MODEL, str(source), size_of(source))


def _with_keeping(context: Context, scratch: Path, before: Path, reporter: Reporter, evidence: Evidence) -> Evidence:
    """Where a quantization loses what training gained and none keeps it, measure larger ones until one does."""
    measured = {each.gguf.name for each in (*evidence.ggufs, *evidence.trials)}
    for name in _LARGER:
        if not gain.lost(evidence) or gain.smallest_that_keeps(evidence):
            break
        if name not in measured:
            tried = tuple(_measure_trials(context, scratch, before, reporter, [name]))
            evidence = dataclasses.replace(evidence, trials=(*evidence.trials, *tried))
    return evidence


def _measure_trials(
    context: Context, scratch: Path, before: Path, reporter: Reporter, names: Sequence[str]
) -> Iterator[MeasuredGguf]:
    """Make, measure and remove each quantization that the run does not keep; one at a time is on the disk."""
    run = context.run
    if not names:
        return
    source, log = run.gguf, run.log(NAME)
    if not source.is_file():
        reporter.doing("converting to GGUF; the file is removed after measuring")
        source = scratch / run.gguf.name
        conversion_source.make_gguf(context, source, log, reporter)
    with_matrix = run_matrix.with_matrix(context, names)
    matrix = run_matrix.find_matrix(context, source, scratch / run.importance_matrix.name, log, reporter, with_matrix)
    compensation = conversion_source.find_compensation(context, log, reporter)
    for name in names:
        reporter.doing(f"trying {name}")
        target = scratch / run.quantized(name).name
        imatrix = matrix if name in with_matrix else None
        if read_budget(name) is None:
            quantize.quantize_file(source, target, name, log, reporter, imatrix, compensation=compensation)
        else:
            budgets = conversion_source.find_budgets(
                context, source, run.sensitivity, log, reporter, imatrix, compensation
            )
            budgets.make(name, target)
        after = scratch / f"{name}.npy"
        measurement = _measure_gguf(context, scratch, name, target, None, before, after)
        yield MeasuredGguf(MeasuredFile(name, "", target.stat().st_size), "", measurement)
        remove(target)
        remove(after)


def _ties_embeddings(model: Path) -> bool:
    try:
        return read_model_config(model).ties_embeddings
    except ModelError:
        return False


def _measure_reference(context: Context, scratch: Path, reporter: Reporter) -> tasks.Reference:
    """Measure base, adapter and merged model with transformers; return what the GGUFs are compared with."""
    run, config = context.run, context.config
    source, held_out = context.source, (run.prepared / HELD_OUT_TOKENS).is_file()
    if source is None:
        tokens = str(run.prepared / (HELD_OUT_TOKENS if held_out else TRAIN_TOKENS))
        train_data, adapter = [str(path) for path in config.train_data], str(run.adapter)
    else:
        held_out, tokens = False, ""
        train_data, adapter = [_written_samples(scratch)], str(source) if is_adapter(source) else ""
    plans = conversion_source.tensor_plans(context, run.log(NAME), reporter) if _has_adapter(context) else {}
    task = tasks.ModelsTask(
        base=str(context.base),
        base_sha256=context.hasher.of(context.base) if adapter else "",
        adapter=adapter,
        merged=str(run.merged_model) if run.merged_model.is_dir() else "",
        tokenizer=str(_tokenizer(context)),
        tokens=tokens,
        learns_empty_thoughts=config.empty_thoughts == "learn",
        chats_file=str(run.prepared / HELD_OUT_CHATS) if held_out else "",
        train_data=train_data,
        reading=ReadingOptions.of(config),
        most_chats=config.compare_chats,
        most_tokens=config.compare_length,
        own_prompts=list(config.compare_prompt),
        system=config.system or "",
        most_answers=config.compare_answers,
        longest_answer=_LONGEST_ANSWER,
        scratch=str(scratch),
        places={source: GgufPlace(plan.name, plan.order) for source, plan in plans.items()},
        general_tokens=_GENERAL_TOKENS[config.general] if adapter else 0,
        general_answers=config.general == "full",
        is_packed=computation_gate.proves_packed(context, reporter),
        ggufs={str(gguf): str(modelfile) for _, gguf, modelfile in _ggufs(context) if gguf.is_file()},
    )
    typed_storage.write(scratch / "models.json", task)
    _run_task(run, "models", scratch / "models.json", reporter, **_KEPT_MEMORY)
    return typed_storage.read(tasks.Reference, scratch / tasks.REFERENCE_FILE)


def _tokenizer(context: Context) -> Path:
    """Return the folder with the trained tokenizer and template."""
    run = context.run
    if context.source is None:
        return run.tokenizer
    return next((folder for folder in (run.merged_model, run.exported_tokenizer) if folder.is_dir()), context.base)


def _written_samples(scratch: Path) -> str:
    """Write the starter chats into a folder; return the file."""
    path = scratch / "samples.jsonl"
    chats = importlib.resources.files("kolotune.chats.starter").joinpath("chats.jsonl")
    path.write_text(chats.read_text(encoding="utf-8"), encoding="utf-8")
    return str(path)


def _answer_file(scratch: Path, name: str) -> Path:
    """Return the file for the measurement of a GGUF."""
    return scratch / f"{name}.answer.json"


def _measure_gguf(
    context: Context,
    scratch: Path,
    name: str,
    gguf: Path,
    modelfile: Path | None,
    before: Path,
    after: Path,
    waits: bool = False,
    threads: int = 0,
    others: Sequence[str] = (),
) -> tasks.GgufMeasurement:
    """Measure a GGUF in a child process; `waits`: compare with the unquantized one, which is measured too."""
    task = tasks.GgufTask(
        gguf=str(gguf),
        modelfile=str(modelfile or ""),
        reference=str(scratch / tasks.REFERENCE_FILE),
        before=str(before),
        after=str(after),
        system=context.config.system or "",
        longest_answer=_LONGEST_ANSWER,
        answer_file=str(_answer_file(scratch, name)),
        traits=recorded_traits(context.run),
        threads=threads,
        others=list(others),
        unquantized=str(_answer_file(scratch, F16)) if waits else "",
        unquantized_after=str(scratch / f"{F16}.npy") if waits else "",
    )
    typed_storage.write(scratch / f"{name}.json", task)
    answer = Path(task.answer_file)
    try:
        _run_task(context.run, "gguf", scratch / f"{name}.json", None, **_ONE_NUMPY_THREAD)
    except _ProcessDied as died:
        # llama.cpp ends the process on files that it does not expect.
        wrong = defect(DefectKind.NOT_MEASURABLE, reason=f"llama.cpp fails on the file: {died.cause}")
        typed_storage.write(answer, tasks.GgufMeasurement(tasks.Figures(defects=[wrong])))
    except BaseException:
        typed_storage.write(answer, tasks.GgufMeasurement(tasks.Figures()))  # others wait for it
        raise
    return typed_storage.read(tasks.GgufMeasurement, answer)


class _ProcessDied(ArtifactError):
    """A measuring process ended without an answer."""


def _run_task(run: RunFolder, kind: str, file: Path, reporter: Reporter | None, **env: str) -> None:
    """Carry out a task in a child process, which gets the variables `env`.

    Raises:
        KolotuneError: the error that the process reported.
        _ProcessDied: it ended without an answer.
    """

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
        env={"TOKENIZERS_PARALLELISM": "false", **env},
    )
    if code != 0:
        raise _ProcessDied(f"measuring ended with code {code}: {local.last_lines(log)}", f"The log is {log}.")


def _recorded_losses(run: RunFolder, config: Config) -> tuple[float | None, float] | None:
    """Return the held-out losses of the base and of the kept adapter that training measured; None if it did not."""
    if not run.metrics.is_file():
        return None
    lines = read_metrics(run.metrics, skip_damaged=True)
    losses = answer_losses(lines, early_stopping=bool(config.early_stopping))
    return losses if losses is None or config.start_from is None else (None, losses[1])
