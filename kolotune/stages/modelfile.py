"""modelfile: a Modelfile for each GGUF, with the trained template in Ollama's language and all stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.chats.templates.reply_format import end_token
from kolotune.chats.tokens.tokenizer import (
    TOKENIZER_FILES,
    chat_template,
    load_tokenizer,
    named_tokens,
    special_tokens,
    template_text,
)
from kolotune.chats.tokens.trained_template import trained_template
from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config, plain_values, stage_options
from kolotune.foundation.errors import ArtifactError, ConfigError, ModelError
from kolotune.foundation.files import write_text
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.ollama import parameters
from kolotune.ollama.go_template_writer import write_go_template
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.ollama.prompt_path import (
    READS_JINJA,
    OwnRendering,
    PromptPath,
    TemplateSources,
    find_rule,
    own_rendering,
)
from kolotune.ollama.stop_strings import stop_strings
from kolotune.ollama.template_capabilities import Capability, jinja_capabilities
from kolotune.ollama.template_derivation import NotDerivable, derive
from kolotune.ollama.turn_format import Caveat, TurnFormat
from kolotune.run_folder.cleaned import read_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.weights.adapter_folder import is_adapter
from kolotune.weights.model_config import read_model_config

NAME = "modelfile"
DOING = "writing the Modelfiles"
# Ollama up to the summer of 2026 penalizes repetition (by 1.1) unless a model sets this: what is served would differ
# from what was trained, and code, lists and names would suffer.
_NO_REPEAT_PENALTY = ("repeat_penalty", "1")
_NO_TOOLS_WITH_TEMPLATE = "with a TEMPLATE, Ollama does not offer tools to models of this architecture"


def options(config: Config) -> JsonObject:
    return stage_options(config, NAME) | (plain_values(config, ["lean"]) if config.lean else {})


def inputs(context: Context) -> dict[str, Path]:
    folder = _trained_tokenizer(context)
    files = {f"the trained {name}": folder / name for name in TOKENIZER_FILES}
    if own_rendering(_architecture(context)) is not None:
        files["the model's config"] = _model_folder(context) / "config.json"
    return files


def outputs(context: Context) -> list[Path]:
    return [file for file, _ in _files(context)]


def packages() -> Sequence[str]:
    return ("jinja2", "transformers")


def _files(context: Context) -> list[tuple[Path, Path]]:
    """Return each Modelfile and the GGUF that it names."""
    run, kept = context.run, kept_models(context.config)
    unquantized = [(run.modelfile(), run.gguf)] if kept.unquantized else []
    return [*unquantized, *((run.modelfile(name), run.quantized(name)) for name in kept.quantized)]


def _trained_tokenizer(context: Context) -> Path:
    if context.source is None:
        return context.run.tokenizer
    if not is_adapter(context.source):
        return context.source
    return context.run.merged_model if kept_models(context.config).merged else context.run.exported_tokenizer


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
class ServingFormat:
    """How Ollama writes a model's prompts and finds the end of its answers.

    Attributes:
        template: Ollama's TEMPLATE; None where none is written: Ollama then uses the one in the GGUF.
        reason: why none is written.
        caveats: where TEMPLATE's prompts differ from the trained ones, a sentence each.
        stops: strings that end an answer.
        path: what renders the prompts in the newest Ollama.
        takes_system: whether the trained template accepts system turns.
        own: Ollama's own code for the architecture, or None.
    """

    template: str | None
    reason: str
    caveats: tuple[str, ...]
    stops: tuple[str, ...]
    path: PromptPath
    takes_system: bool = True
    own: OwnRendering | None = None


def derive_format(tokenizer: Path, jinja: str, architecture: str = "") -> ServingFormat:
    """Derive Ollama's TEMPLATE and the stops from a chat template and the tokenizer in a folder.

    Args:
        tokenizer: the folder.
        jinja: the chat template.
        architecture: the GGUF's, for which Ollama may have code of its own.

    Raises:
        ModelError, TemplateError: there is no tokenizer or no usable template.
    """
    loaded = load_tokenizer(tokenizer)
    template = chat_template(loaded, jinja)
    named = special_tokens(loaded)
    special = frozenset(str(token) for token in loaded.added_tokens_decoder.values() if token.special)
    end = end_token(template, special)
    turns = derive(lambda messages, opened: template.render(messages, None, opened), named.get("bos_token", ""))
    written, reason = None, ""
    caveats: tuple[Caveat, ...] = ()
    if isinstance(turns, NotDerivable):
        reason = turns.reason
        stops = [token for token in (end, named.get("eos_token", "")) if token]
    else:
        written, caveats = _go_template(turns, tokenizer), turns.caveats
        stops = [*stop_strings(turns, named.get("eos_token", ""), end, special)]
    rule = find_rule(TemplateSources(architecture, jinja, written))
    if rule.path is PromptPath.HARMONY and Capability.TOOLS in jinja_capabilities(jinja).named:
        written, reason, caveats = None, _NO_TOOLS_WITH_TEMPLATE, ()
        rule = find_rule(TemplateSources(architecture, jinja))
    own = own_rendering(architecture)
    return ServingFormat(
        template=written,
        reason=reason,
        caveats=tuple(map(str, caveats)),
        stops=tuple(dict.fromkeys((*stops, *(own.stops if own else ())))),
        path=rule.path,
        takes_system=isinstance(turns, NotDerivable) or not turns.refuses_system,
        own=own,
    )


def _go_template(turns: TurnFormat, tokenizer: Path) -> str:
    """Return the template, with a BOS exactly when the GGUF does not make Ollama add one itself."""
    file = tokenizer / "tokenizer_config.json"
    adds_bos = typed_storage.read_object(file).get("add_bos_token") if file.is_file() else False
    return write_go_template(turns, include_bos=bool(turns.bos) and adds_bos is not True)


def _model_folder(context: Context) -> Path:
    """Return the folder with the model's config, tokenizer and template, before anything is made."""
    return context.source if context.source is not None and not is_adapter(context.source) else context.base


def _architecture(context: Context) -> str:
    """Return the architecture that the GGUF names, where Ollama treats it in a way of its own; else any name."""
    try:
        model_type = read_model_config(_model_folder(context)).model_type
    except ModelError:
        return ""
    return model_type.removesuffix("_text").replace("gpt_oss", "gpt-oss")


def preflight(context: Context, reporter: Reporter) -> None:
    """Check that the template can be served, and that a Modelfile can express parameters and system prompt.

    Raises:
        ConfigError: a Modelfile can't express the user's values, or the template refuses system prompts.
        TemplateError: answers of this template have no end.
    """
    folder = _model_folder(context)
    jinja = trained_template(context.config, folder, named_tokens(folder))
    serving = derive_format(folder, jinja, _architecture(context))
    if serving.own is not None:
        reporter.warning(
            f"Ollama renders this model in code of its own ({serving.own.renderer}), whatever its template says; "
            "`kolotune install` compares its prompts with the trained ones"
        )
    if context.config.system and not serving.takes_system:
        raise ConfigError(
            "system: the chat template of this model refuses system prompts",
            "Put the instruction into the user turns of the chats, and omit --system.",
        )
    render_modelfile(Modelfile("./Merged.gguf", system=context.config.system, parameters=_parameters(context.config)))


def _report_plain_text(context: Context, jinja: str, reporter: Reporter) -> None:
    """Say how a model that was trained on plain text is served."""
    if is_plain_text(jinja):
        reporter.note(
            "the base has no chat template: servers hand a prompt to the model as it is, and the model continues it"
        )
    elif context.source is None and context.config.objective == "text":
        reporter.note(
            "what is served is the base's chat template, which plain text did not train: to train on chats next, "
            f"kolotune run chats.jsonl --start-from {context.run.root}"
        )


def _parameters(config: Config) -> parameters.Parameters:
    """Return the user's parameters, without a penalty for repetition unless they set one."""
    pairs = [(name.strip(), value) for name, _, value in (text.partition("=") for text in config.parameter)]
    sets_penalty = any(name == _NO_REPEAT_PENALTY[0] for name, _ in pairs)
    return parameters.validate(pairs if sets_penalty else [*pairs, _NO_REPEAT_PENALTY])


def run(context: Context, reporter: Reporter) -> JsonObject:
    """Write the Modelfiles; `render` has proved that each is read back unchanged."""
    folder = _trained_tokenizer(context)
    serving = derive_format(folder, template_text(folder), _architecture(context))
    _report_plain_text(context, template_text(folder), reporter)
    if serving.template is None:
        reporter.warning(f"no TEMPLATE is written, because {serving.reason}; Ollama uses the one in the GGUF")
    where = "in Ollama"
    if not serving.path.is_go:
        where = f"in Ollama before {'.'.join(map(str, READS_JINJA))}, which reads TEMPLATE only"
    for caveat in serving.caveats:
        reporter.note(f"{where}: {caveat}")
    chosen = _parameters(context.config)
    stops = tuple(("stop", stop) for stop in serving.stops if ("stop", stop) not in chosen)
    cleaned = read_cleaned(context.run)
    for file, gguf in _files(context):
        if not gguf.is_file() and context.run.relative(gguf) not in cleaned:
            raise ArtifactError(f"{gguf}: there is no such GGUF", "Run the stages before it: `kolotune run`.")
        text = render_modelfile(
            Modelfile(
                f"./{gguf.name}",
                template=serving.template,
                system=context.config.system,
                parameters=(*stops, *chosen),
                renderer=serving.own.renderer if serving.own else None,
                parser=serving.own.parser if serving.own else None,
            )
        )
        write_text(file, text)
    return {
        "stops": list(serving.stops),
        "template": serving.template is not None,
        "caveats": list(serving.caveats),
        "path": serving.path.value,
    }
