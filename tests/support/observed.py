"""What a real Ollama showed and rendered: 60 models with 16 chats each; the file says which version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.ollama.prompt_path import TemplateSources

_DATA = json.loads(Path(__file__).with_name("ollama_observed.json").read_text(encoding="utf-8"))
CHATS: dict[str, dict[str, Any]] = _DATA["chats"]
GGUF_TEMPLATES: dict[str, str] = _DATA["gguf_templates"]
DATE = "29 Nov 2026"  # the day of the observation, as the templates write it
# Stands for Ollama's own for ChatML, whose text the data does not have: it writes the same.
KNOWN_CHATML = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class ObservedModel:
    """One model.

    Attributes:
        gguf_name, modelfile_name: the names of its templates.
        jinja: the GGUF's template.
        template: the Modelfile's TEMPLATE, or None.
        shows: what show named: the template of "gguf" or "modelfile", or a "known" one of Ollama's own.
        capabilities: as show named them.
        stops: the stop strings that creation set.
        prompts: by the name of the chat: the prompt, or the status and error of a refusal.
    """

    gguf_name: str
    modelfile_name: str
    jinja: str
    template: str | None
    shows: str
    capabilities: tuple[str, ...]
    stops: tuple[str, ...]
    prompts: dict[str, str | dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.gguf_name}, {self.modelfile_name}"

    @property
    def sources(self) -> TemplateSources:
        """What decides how it is rendered; creation sets stops exactly where it recognises the GGUF's template."""
        known = KNOWN_CHATML if self.stops and self.template is None else None
        return TemplateSources("llama", self.jinja, self.template, known=known)

    @property
    def shown_template(self) -> str:
        return {"gguf": self.jinja, "modelfile": self.template or "", "known": KNOWN_CHATML}[self.shows]


def _model(row: dict[str, Any]) -> ObservedModel:
    return ObservedModel(
        row["gguf_template"],
        row["modelfile_template"],
        GGUF_TEMPLATES[row["gguf_template"]],
        _DATA["modelfile_templates"][row["modelfile_template"]],
        row["shows"],
        tuple(row["capabilities"]),
        tuple(row["stops"]),
        dict(zip(CHATS, (_DATA["prompts"][number] for number in row["prompts"]), strict=True)),
    )


OBSERVED = [_model(row) for row in _DATA["observed"]]
