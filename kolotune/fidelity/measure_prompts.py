"""Ask how the prompts of a GGUF are written and tokenized, on each path that a server may take.

llama.cpp's own server is asked, with the tokenizer and template in the GGUF. On the Modelfile's path Ollama renders the
TEMPLATE by itself, and leaves the tokens to the same server.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, KolotuneError, TemplateError
from kolotune.llamacpp.prompt_server import PromptServer, SparseGguf
from kolotune.llamacpp.tokenizer_model import read_tokenizer_model
from kolotune.ollama.go_template_renderer import render_go_template
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.ollama.prompt_path import PromptPath, TemplateSources, find_rule
from kolotune.weights.gguf_metadata import read_metadata

from .prompt_proof import Prompt, PromptResult, PromptSet, Server, ask
from .tasks import AskedPath


@dataclass(frozen=True)
class _Asked:
    """What a GGUF's prompts gave, as it is kept in the scratch folder."""

    paths: list[AskedPath]


def ask_paths(gguf: Path, template: str | None, prompts: PromptSet, scratch: Path) -> list[AskedPath]:
    """Ask for all prompts: rendered from the GGUF's own template, and from a TEMPLATE.

    Args:
        gguf: the file; only its header is read.
        template: TEMPLATE of the Modelfile; None for none.
        prompts: as trained.
        scratch: folder that keeps the answers, since the GGUFs of a run have the same header.

    Raises:
        ToolchainError: llama.cpp's server is not installed.
        ArtifactError: the GGUF is damaged, or llama.cpp can't load its tokenizer.
    """
    model = read_tokenizer_model(gguf)
    key = hashlib.sha256(model.header + b"\0" + (template or "").encode()).hexdigest()[:32]
    file = scratch / f"prompts-{key}.json"
    asked = typed_storage.read_or_none(_Asked, file)
    if asked is None:
        asked = _Asked(list(_ask(model, template, prompts)))
        typed_storage.write(file, asked)
    return asked.paths


def ask_ahead(ggufs: Mapping[str, str], prompts: PromptSet, scratch: Path) -> None:
    """Ask for the prompts of GGUFs whose files are given with their Modelfiles' ("" for none); see `ask_paths`.

    What fails is left to the measurement of that GGUF.
    """
    for gguf, modelfile in ggufs.items():
        with contextlib.suppress(KolotuneError, OSError, UnicodeDecodeError):
            template = parse_modelfile(Path(modelfile).read_text(encoding="utf-8")).template if modelfile else None
            ask_paths(Path(gguf), template, prompts, scratch)


def ollama_path(gguf: Path, modelfile: Modelfile) -> str:
    """Return which path the newest Ollama takes (`PromptPath`); "" where it can't be said."""
    metadata = read_metadata(gguf)
    architecture, jinja = (str(metadata.get(name, "")) for name in ("general.architecture", "tokenizer.chat_template"))
    sources = TemplateSources(architecture, jinja, modelfile.template, modelfile.renderer, modelfile.parser)
    try:
        return find_rule(sources).path
    except ArtifactError:
        return ""


def _ask(model: SparseGguf, template: str | None, prompts: PromptSet) -> Iterator[AskedPath]:
    try:
        server = PromptServer(model)
    except TemplateError as error:
        yield _on_path(PromptPath.JINJA, _Refusing(error), prompts)
        return
    with server:
        yield _on_path(PromptPath.JINJA, server, prompts)
        if template is not None:
            yield _on_path(PromptPath.TEMPLATE, _GoTemplate(template, server), prompts)


def _on_path(path: PromptPath, server: Server, prompts: PromptSet) -> AskedPath:
    def results(asked: Sequence[Prompt]) -> list[PromptResult]:
        writable = [prompt for prompt in asked if path is PromptPath.JINJA or prompt.plain]
        return list(ask(writable, server, prompts.pieces, prompts.bos))

    return AskedPath(path, results([*prompts.prompts, *prompts.probes]), results(prompts.battery))


@dataclass
class _GoTemplate:
    """Renders TEMPLATE as Ollama does; llama.cpp's server tokenizes."""

    template: str
    server: Server

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        /,
        **switches: bool,
    ) -> str:
        del tools, switches  # no TEMPLATE of ours has any
        return render_go_template(self.template, messages)

    def tokens(self, text: str) -> list[int]:
        return self.server.tokens(text)


@dataclass
class _Refusing:
    """Stands for a server that can't use the template at all."""

    error: TemplateError

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        /,
        **switches: bool,
    ) -> str:
        raise self.error

    def tokens(self, text: str) -> list[int]:
        raise self.error
