"""modelfile: a Modelfile for each GGUF, with the trained template in Ollama's language and all stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from kolotune.chats.templates.loss_mask import end_token
from kolotune.chats.templates.template import freeze_date
from kolotune.chats.tokens.tokenizer import (
    TOKENIZER_FILES,
    chat_template,
    load_tokenizer,
    special_tokens,
    template_text,
)
from kolotune.foundation.config import Config, as_record
from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.foundation.files import write_text
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.ollama import parameters
from kolotune.ollama.modelfile import Modelfile, render
from kolotune.ollama.template import NotDerivable, TurnFormat, derive, stop_strings
from kolotune.run_folder.cleaned import read_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import now, read_record
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.source import read_source
from kolotune.run_folder.stage import Context
from kolotune.weights.adapter import is_adapter

NAME = "modelfile"
DOING = "writing the Modelfiles"
# Ollama up to the summer of 2026 punishes repetition (by 1.1) wherever a model does not say otherwise: what is served
# would not be what was trained, and code, lists and names suffer.
_UNPUNISHED = ("repeat_penalty", "1")


def options(config: Config) -> JsonObject:
    """See `records.Stage`."""
    return as_record(config, ("system", "parameter", "quantization", *(("lean",) if config.lean else ())))


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    folder = _trained_tokenizer(context)
    return {f"the trained {name}": folder / name for name in TOKENIZER_FILES}


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    return [file for file, _ in _files(context)]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("jinja2", "transformers")


def _files(context: Context) -> list[tuple[Path, Path]]:
    """Each Modelfile and the GGUF that it names."""
    run = context.run
    there = kept_models(context.config)
    unquantized = [(run.modelfile(), run.gguf)] if there.unquantized else []
    return [*unquantized, *((run.modelfile(name), run.quantized(name)) for name in there.quantized)]


def _trained_tokenizer(context: Context) -> Path:
    if context.source is None:
        return context.run.tokenizer
    if not is_adapter(context.source):
        return context.source
    return context.run.merged_model if kept_models(context.config).merged else context.run.exported_tokenizer


def tokenizer_folder(run: RunFolder) -> Path:
    """Return the folder of a finished run that contains the trained tokenizer and template.

    Raises:
        ArtifactError: there is none.
    """
    source = read_source(run)
    folders = [run.tokenizer, run.merged_model, run.exported_tokenizer, *([source] if source else [])]
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise ArtifactError(f"{run.root}: its tokenizer is missing")


def recorded_stops(run: RunFolder) -> tuple[str, ...]:
    """Return the stop strings that a finished run's Modelfiles contain.

    Raises:
        ArtifactError: there are no Modelfiles yet.
    """
    record = read_record(run, NAME)
    stops = record.facts.get("stops") if record else None
    if not isinstance(stops, list):
        raise ArtifactError(f"{run.root}: has no Modelfiles yet", "Run `kolotune run` first.")
    return tuple(map(str, stops))


@dataclass(frozen=True)
class Serving:
    """How a model is served: the Go template (None: Ollama chooses, for `reason`), caveats, and the stops.

    `takes_system` is False where the trained template refuses system turns.
    """

    template: str | None
    reason: str
    caveats: tuple[str, ...]
    stops: tuple[str, ...]
    takes_system: bool = True


def serving_of(tokenizer: Path, jinja: str) -> Serving:
    """Derives template and stops from a chat template and the tokenizer in a folder.

    Raises:
        ModelError, TemplateError: there is no tokenizer or no usable template.
    """
    loaded = load_tokenizer(tokenizer)
    template = chat_template(loaded, jinja)
    named = special_tokens(loaded)
    special = frozenset(str(each) for each in loaded.added_tokens_decoder.values() if each.special)
    end = end_token(template, special)
    found = derive(lambda messages, opened: template.render(messages, None, opened), named.get("bos_token", ""))
    if isinstance(found, NotDerivable):
        stops = tuple(dict.fromkeys(each for each in (end, named.get("eos_token", "")) if each))
        return Serving(None, found.reason, (), stops)
    stops = stop_strings(found, named.get("eos_token", ""), end, special)
    return Serving(_go_template(found, tokenizer), "", found.caveats, stops, not found.refuses_system)


def _go_template(found: TurnFormat, tokenizer: Path) -> str:
    """The template, with a BOS exactly when the GGUF does not make Ollama add one itself."""
    file = tokenizer / "tokenizer_config.json"
    adds = json.loads(file.read_text(encoding="utf-8")).get("add_bos_token") if file.is_file() else False
    return found.go_template(include_bos=bool(found.bos) and adds is not True)


def preflight(context: Context, reporter: Reporter) -> None:
    """The template must be one that can be served, and parameters and system prompt of a kind that is carried.

    Raises:
        ConfigError: a Modelfile can't carry the user's values, or the template has no place for a system prompt.
        TemplateError: answers of this template have no end.
    """
    del reporter
    folder = context.source if context.source is not None and not is_adapter(context.source) else context.base
    day = date.fromisoformat(context.config.template_date or now()[:10])
    serving = serving_of(folder, freeze_date(template_text(folder), day))
    if context.config.system and not serving.takes_system:
        raise ConfigError(
            "system: the chat template of this model refuses system prompts",
            "Put the instruction into the chats' user turns and leave --system out.",
        )
    render(Modelfile("./Merged.gguf", system=context.config.system, parameters=_parameters(context.config)))


def _parameters(config: Config) -> parameters.Parameters:
    """The user's, and no penalty for repetition unless they say so."""
    pairs = [(name.strip(), value) for name, _, value in (each.partition("=") for each in config.parameter)]
    return parameters.validate(pairs if any(name == _UNPUNISHED[0] for name, _ in pairs) else [*pairs, _UNPUNISHED])


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Writes the Modelfiles; each has been parsed back and is equal."""
    folder = _trained_tokenizer(context)
    serving = serving_of(folder, template_text(folder))
    if serving.template is None:
        reporter.warning(f"no TEMPLATE is written, because {serving.reason}; Ollama then uses the one in the GGUF")
    for caveat in serving.caveats:
        reporter.note(f"in Ollama: {caveat}")
    chosen = _parameters(context.config)
    stops = tuple(("stop", stop) for stop in serving.stops if ("stop", stop) not in chosen)
    gone = read_cleaned(context.run)
    for file, gguf in _files(context):
        if not gguf.is_file() and context.run.relative(gguf) not in gone:
            raise ArtifactError(f"{gguf}: there is no such GGUF", "Run the stages before it: `kolotune run`.")
        text = render(
            Modelfile(
                f"./{gguf.name}",
                template=serving.template,
                system=context.config.system,
                parameters=(*stops, *chosen),
            )
        )
        write_text(file, text)
    return {"stops": list(serving.stops), "template": serving.template is not None, "caveats": list(serving.caveats)}
