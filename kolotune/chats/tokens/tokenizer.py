"""The base model's tokenizer and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ModelError, TemplateError

from ..templates.template import ChatTemplate

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", TEMPLATE_FILE, "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it can't be loaded.
    """
    try:
        loader: Any
        if _is_plain(folder):
            from transformers import PreTrainedTokenizerFast as loader
        else:
            from transformers import AutoTokenizer as loader
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: its tokenizer can't be loaded: {reason}", "Download the model again.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: its tokenizer has no fast form (tokenizer.json)", "Use a model that has one.")
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether a tokenizer is what its tokenizer.json says, and no class of its own changes it.

    AutoTokenizer would find the same class, but loads PyTorch to do so: two seconds, and 130 MB that stay. It has rules
    for other model types, so those are left to it.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json"):
        try:
            found |= {name: json.loads((folder / name).read_text(encoding="utf-8"))}
        except (OSError, ValueError):
            found |= {name: {}}
    config, settings = (each if isinstance(each, dict) else {} for each in found.values())
    return (
        (folder / "tokenizer.json").is_file()
        and settings.get("tokenizer_class") in _PLAIN_CLASSES
        and "auto_map" not in settings
        and config.get("model_type") in (None, "llama")
    )


def template_text(folder: Path) -> str:
    """The Jinja source of the folder's chat template.

    Raises:
        TemplateError: there is none.
    """
    single = folder / TEMPLATE_FILE
    if single.is_file():
        return single.read_text(encoding="utf-8")
    found: Any = None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        if found:
            break
    if isinstance(found, list):  # several named templates: the one for plain chats
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    if not isinstance(found, str) or not found:
        raise TemplateError(
            f"{folder}: the base model has no chat template",
            "Use an instruction-tuned model, or put a chat_template.jinja into its folder.",
        )
    return found


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """The named special tokens, as templates use them."""
    return {name: str(getattr(tokenizer, name)) for name in _SPECIAL if getattr(tokenizer, name, None) is not None}


def template_of(folder: Path) -> ChatTemplate:
    """The chat template in a folder with its special tokens, without loading the tokenizer.

    Raises:
        TemplateError: there is none.
        ModelError: a file of the tokenizer can't be read.
    """
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{folder / name}: is no JSON: {error}", "Download the model again.") from None
        for key in _SPECIAL:
            token = found.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[key] = token
    return ChatTemplate(template_text(folder), named)


def chat_template(tokenizer: Any, jinja: str) -> ChatTemplate:
    """The template with this tokenizer's special tokens."""
    return ChatTemplate(jinja, special_tokens(tokenizer))


def trained_tokenizer(base: Path, jinja: str, *, adds_bos: bool) -> dict[str, Path | str]:
    """The base's tokenizer files by name, with the template as it is trained and the BOS that the template writes.

    The base's own files, not what a library would save of them: the dry conversion has proven just these.
    """
    found: dict[str, Path | str] = {name: base / name for name in TOKENIZER_FILES if (base / name).is_file()}
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config.pop("chat_template", None)
    # Who serves adds a BOS exactly when this says so: it must be what the training chats had.
    config["add_bos_token"] = adds_bos
    config["add_eos_token"] = False
    found[file.name] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    found[TEMPLATE_FILE] = jinja
    return found


def writes_bos(template: ChatTemplate, jinja: str) -> bool:
    """Whether the template itself begins with the BOS token.

    Asked with a BOS that nothing else can write: SmolLM2's is also the token that opens each turn.
    """
    mark = "\ue0f0bos\ue0f1"
    probe = ChatTemplate(jinja, {**template.special_tokens, "bos_token": mark})
    return probe.render([{"role": "user", "content": "a"}], None, True).startswith(mark)
