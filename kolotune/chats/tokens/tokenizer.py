"""The base model's tokenizer and its chat template: load them, and write them as they are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ModelError, TemplateError
from kolotune.foundation.free_memory import return_free_memory
from kolotune.foundation.typed_storage import JsonObject

from ..templates.template import ChatTemplate
from .sentencepiece_model import SENTENCEPIECE_FILE, sentencepiece_model
from .served_tokenizer import Replaced, read_as_served

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = "chat_template.jinja"
_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_FOR_TOOLS, _MORE_TEMPLATES = "tool_use", "additional_chat_templates"
TOKENIZER_FILES = (
    _FILE, _CONFIG_FILE, SENTENCEPIECE_FILE, TEMPLATE_FILE, "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a model folder, which reads texts as llama.cpp does.

    Raises:
        ModelError: There is none, or it can't be loaded.
    """
    return load_served_tokenizer(folder)[0]


def load_served_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, Replaced | None]:
    """Load the tokenizer of `load_tokenizer`; return also what was replaced in it."""
    try:
        import transformers

        loader = transformers.PreTrainedTokenizerFast if _is_plain(folder) else transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: its tokenizer can't be loaded: {reason}", "Download the model again.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: it has no fast tokenizer (tokenizer.json)", "Use a model that has one.")
    replaced = read_as_served(tokenizer.backend_tokenizer, folder / SENTENCEPIECE_FILE)
    return_free_memory()
    return cast("PreTrainedTokenizerFast", tokenizer), replaced


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json says everything about the tokenizer, and no class of its own changes it.

    AutoTokenizer would find the same class, but loads PyTorch to do so: two seconds, and 130 MB that stay. It has rules
    for other model types, so those are left to it.
    """
    settings, config = _object_or_empty(folder / _CONFIG_FILE), _object_or_empty(folder / "config.json")
    return (
        (folder / _FILE).is_file()
        and settings.get("tokenizer_class") in _PLAIN_CLASSES
        and "auto_map" not in settings
        and config.get("model_type") in (None, "llama")
    )


def _object_or_empty(file: Path) -> JsonObject:
    try:
        return typed_storage.read_object(file)
    except (OSError, typed_storage.StorageError):
        return {}


def _read_object(file: Path) -> JsonObject:
    """Read a JSON file of the model; an absent file is an empty object."""
    if not file.is_file():
        return {}
    try:
        return typed_storage.read_object(file)
    except typed_storage.StorageError as error:
        raise ModelError(f"{file}: {error}", "Download the model again.") from None


def template_text(folder: Path) -> str:
    """Return the Jinja source of the folder's chat template.

    If there is another one for chats with tools, by the name of ``tool_use``, the two are one text that chooses as
    transformers does.

    Raises:
        TemplateError: There is none.
        ModelError: A file of the tokenizer can't be read.
    """
    named = _named_templates(folder)
    source = named.get("default")
    if not source:
        raise TemplateError(
            f"{folder}: the base model has no chat template",
            "Use an instruction-tuned model, or give a template with --chat-template; --objective text needs none.",
        )
    for_tools = named.get(_FOR_TOOLS)
    if not for_tools or for_tools == source:
        return source
    # A line break behind a tag, and the last one of a template, are not written.
    for_tools, source = (text.removesuffix("\n") for text in (for_tools, source))
    return f"{{% if tools %}}\n{for_tools}{{% else %}}\n{source}{{% endif %}}"


def has_template(folder: Path) -> bool:
    """Whether the folder has a chat template.

    Raises:
        ModelError: A file of the tokenizer can't be read.
    """
    return bool(_named_templates(folder).get("default"))


def _named_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name; "default" is the one for plain chats."""
    named: dict[str, str] = {}
    files = (folder / name for name in ("chat_template.json", _CONFIG_FILE))
    source = next((text for file in files if (text := _read_object(file).get("chat_template"))), None)
    if isinstance(source, str):
        named["default"] = source
    elif isinstance(source, list):
        for item in source:
            if isinstance(item, dict) and isinstance(item.get("template"), str):
                named[str(item.get("name"))] = item["template"]
    single, more = folder / TEMPLATE_FILE, folder / _MORE_TEMPLATES / f"{_FOR_TOOLS}.jinja"
    if single.is_file():
        named = {"default": single.read_text(encoding="utf-8")}
    if more.is_file():
        named[_FOR_TOOLS] = more.read_text(encoding="utf-8")
    return named


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return the named special tokens, as templates use them."""
    return {name: str(getattr(tokenizer, name)) for name in _SPECIAL if getattr(tokenizer, name, None) is not None}


def template_of(folder: Path) -> ChatTemplate:
    """Return the chat template of a folder with its special tokens, without loading the tokenizer.

    Raises:
        TemplateError: There is none.
        ModelError: A file of the tokenizer can't be read.
    """
    return ChatTemplate(template_text(folder), named_tokens(folder))


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the named special tokens of a folder's tokenizer, without loading it.

    Raises:
        ModelError: A file of the tokenizer can't be read.
    """
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", _CONFIG_FILE):
        values = _read_object(folder / name)
        for key in _SPECIAL:
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[key] = token
    return tokens


def chat_template(tokenizer: PreTrainedTokenizerFast, jinja: str) -> ChatTemplate:
    """Return the template with this tokenizer's special tokens."""
    return ChatTemplate(jinja, special_tokens(tokenizer))


def trained_tokenizer(base: Path, jinja: str, *, adds_bos: bool) -> dict[str, Path | str | bytes]:
    """Return the tokenizer as it is trained: the base's files by name, with this template.

    The base's own files, not what a library would save of them: the dry conversion checks exactly these. A vocabulary
    of SentencePiece's whose own file is missing gets one, since llama.cpp's converter reads the scores there.

    Args:
        base: The folder of the base model.
        jinja: The template, with the date frozen.
        adds_bos: Whether a server has to add a BOS token, since the template writes one.

    Returns:
        For each name the file to copy, or the content to write.
    """
    files: dict[str, Path | str | bytes] = {name: base / name for name in TOKENIZER_FILES if (base / name).is_file()}
    if SENTENCEPIECE_FILE not in files and (content := sentencepiece_model(base / _FILE)) is not None:
        files[SENTENCEPIECE_FILE] = content
    config = _read_object(base / _CONFIG_FILE)
    config.pop("chat_template", None)
    # A server adds a BOS exactly if this says so: it must be what the training chats had.
    config["add_bos_token"] = adds_bos
    config["add_eos_token"] = False
    files[_CONFIG_FILE] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files[TEMPLATE_FILE] = jinja
    return files


def writes_bos(template: ChatTemplate, jinja: str) -> bool:
    """Whether the template itself starts with the BOS token.

    Checked with a BOS that nothing else can write: SmolLM2's is also the token that opens each turn.
    """
    mark = "\ue0f0bos\ue0f1"
    probe = ChatTemplate(jinja, {**template.special_tokens, "bos_token": mark})
    return probe.render([{"role": "user", "content": "a"}], None, True).startswith(mark)
