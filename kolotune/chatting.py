"""A talk with a run's result, or with its base model by the same road, through llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import config as configs
from . import models, records
from .adapters import is_adapter
from .cache import cache_folder
from .chats.tokenizer import template_of
from .config import Config
from .errors import ArtifactError, ConfigError
from .files import Hasher
from .layout import RunFolder
from .llamacpp.inference import GgufModel
from .quantizations import NONE
from .reporter import Reporter
from .stages import convert, modelfile, quantize


class Talk:
    """A conversation: it remembers what was said and renders it with the trained template.

    Args:
        model: what answers.
        tokenizer: folder with the tokenizer and the trained template.
        stops: texts that end an answer.
        system: system prompt, or None.
    """

    def __init__(self, model: GgufModel, tokenizer: Path, stops: tuple[str, ...], system: str | None) -> None:
        self._model, self._stops = model, stops
        self._template = template_of(tokenizer)
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, *, temperature: float, max_tokens: int, seed: int) -> Iterator[str]:
        """The answer to `text`, piece by piece.

        Raises:
            ConfigError: the conversation has grown longer than the model can read.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._model.tokens(self._template.render(messages, None, True))
        room = self._model.context - len(prompt)
        if room < 1:
            raise ConfigError("the conversation is longer than the model can read", "Start a new chat.")
        pieces: list[str] = []
        for piece in self._model.generate(
            prompt, self._stops, temperature=temperature, max_tokens=min(max_tokens, room), seed=seed
        ):
            pieces.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def open_chat(
    run: RunFolder,
    reporter: Reporter,
    *,
    quantization: str | None = None,
    base: bool = False,
    system: str | None = None,
) -> Talk:
    """A talk with the GGUF of a run.

    Args:
        run: the run folder.
        reporter: told when the base model has to be converted first.
        quantization: which one; "none" for the unquantized; default: the run's first.
        base: the base model in place of the tuned one.
        system: system prompt; None: the run's.

    Raises:
        RunFolderError, ArtifactError, ConfigError: there is no such run or no such GGUF, or it isn't what was made.
    """
    run.require()
    config = configs.resolve((configs.load_file(run.config), str(run.config), run.root))
    name = (quantization or config.quantization[0]).upper() if config.quantization or quantization else NONE
    path = _base_gguf(run, config, name, reporter) if base else _own_gguf(run, name)
    written = records.read(run, modelfile.NAME)
    if written is None:
        raise ArtifactError(f"{run.root}: has no Modelfiles yet", "Run `kolotune run` first.")
    stops = tuple(written.facts["stops"])
    return Talk(GgufModel(path), modelfile.tokenizer_folder(run), stops, config.system if system is None else system)


def _own_gguf(run: RunFolder, name: str) -> Path:
    """The run's GGUF, if it is the one that the run made."""
    path, stage = (run.gguf, "convert") if name == NONE else (run.quantized(name), "quantize")
    record = records.read(run, stage)
    if run.relative(path) in records.cleaned(run):
        raise ArtifactError(f"{path}: was cleaned", f"`kolotune {stage} {run.root}` makes it again.")
    if not path.is_file() or record is None:
        there = ", ".join(sorted(each.name for each in run.root.glob("*.gguf"))) or "none"
        raise ArtifactError(
            f"{path}: there is no such GGUF in this run (there is: {there})", "Run `kolotune run` first."
        )
    facts = record.facts.get("made", {}).get(name) or record.outputs.get(path.name) or {}
    if facts.get("sha256") != Hasher(run.hash_cache).of(path):
        raise ArtifactError(f"{path}: is not the file that the run made")
    return path


def _base_gguf(run: RunFolder, config: Config, name: str, reporter: Reporter) -> Path:
    """The base model as a GGUF of the same quantization, made once and kept in the cache."""
    base = models.resolve(config.base_model, None, reporter)
    if is_adapter(base):
        raise ConfigError(f"{base}: is an adapter, not a base model", "Give the base model itself.")
    folder = cache_folder("base_ggufs") / Hasher().of(base)[:32]
    plain = folder / "Base.gguf"
    if not plain.is_file():
        reporter.doing(f"converting {config.base_model} itself, once")
        convert.convert_folder(base, plain, run.log("base"), reporter, exact=False)
    if name == NONE:
        return plain
    target = folder / f"Base{name}.gguf"
    if not target.is_file():
        quantize.quantize_file(plain, target, name, run.log("base"), reporter)
    return target
