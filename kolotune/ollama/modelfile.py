"""What a Modelfile says."""

from __future__ import annotations

from dataclasses import dataclass

from .parameters import Parameters


@dataclass(frozen=True)
class Modelfile:
    """What kolotune says to Ollama about a model.

    Attributes:
        from_: the GGUF file, as a relative path that begins with `./`. Other paths are refused: Ollama takes a path
            that it does not find for the name of a model.
        template: the Go template, or None for what Ollama chooses.
        system: the system prompt.
        renderer, parser: the names of Ollama's own code for the model, or None.
        parameters: name and value pairs; `stop` may occur several times.
        license: the text of the license.
        comments: lines for people, at the top.
    """

    from_: str
    template: str | None = None
    system: str | None = None
    parameters: Parameters = ()
    license: str | None = None
    comments: tuple[str, ...] = ()
    renderer: str | None = None
    parser: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(str(value) for name, value in self.parameters if name == "stop")


@dataclass(frozen=True)
class ModelDescription:
    """Everything in a Modelfile that Ollama's API accepts too; kolotune itself writes less (`Modelfile`).

    Attributes:
        from_: the argument of FROM.
        template, system, renderer, parser: None where there is none.
        parameters: name and value pairs.
        licenses: the texts of licenses.
        messages: role and text of the turns that every chat begins with.
    """

    from_: str
    template: str | None = None
    system: str | None = None
    parameters: Parameters = ()
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    renderer: str | None = None
    parser: str | None = None
