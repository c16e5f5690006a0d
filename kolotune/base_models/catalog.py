"""Base models: the names kolotune knows, where they come from, and what a usable folder is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import AccessError, ConfigError, ModelError, ModelNotFoundError, OfflineError
from kolotune.foundation.files import hash_file
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import HUB_TOKEN, Secret
from kolotune.weights.model_config import read_model_config
from kolotune.weights.weight_files import weight_files

from . import hub_client, packaged_model
from .downloads import cache_folder

# Everything that training and export read; never pickles, never the original/ copies of the weights.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*")
_HUB_IGNORED = ("original/*", "*/*.safetensors", "onnx/*", "*.bin", "*.pth", "*.pt")
_WANTED: dict[str, Any] = {"allow_patterns": list(_HUB_FILES), "ignore_patterns": list(_HUB_IGNORED)}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class KnownModel:
    """A base model known by name.

    Attributes:
        name: as the user writes it, in any case.
        source: where it comes from, in words.
        parameters: number of weights.
        needs_token: whether the hub asks for a login and an approval.
        hub_id: its name on the hub.
        license: as the hub's model cards name it.
    """

    name: str
    source: str
    parameters: int
    needs_token: bool
    hub_id: str
    license: str


def _llama(name: str, parameters: int, license: str) -> KnownModel:
    return KnownModel(name, "hub", parameters, True, name, license)


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        packaged_model.NAME,
        "Python package, no account needed",
        134_515_008,
        False,
        packaged_model.HUB_ID,
        "apache-2.0",
    ),
    _llama("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "llama3.2"),
    _llama("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "llama3.2"),
    _llama("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "llama3.1"),
)


def known(name: str) -> KnownModel | None:
    """The known model of that name, in any case; None when it is another one."""
    return next((each for each in KNOWN if each.name.lower() == name.lower()), None)


def canonical(name: str) -> str:
    """A known model's name in its own spelling; any other name as it is."""
    found = known(name)
    return found.name if found else name


def hub_id(name: str) -> str:
    """What the hub calls the base model `name`; "" for a folder, whose place is nobody's business."""
    found = known(name)
    if found is not None:
        return found.hub_id
    return name if is_hub_id(name) and not _is_there(name) else ""


def locate(name: str) -> Path | None:
    """The folder of a base model that is on this machine already; None when it isn't."""
    name = canonical(name)
    if name == packaged_model.NAME:
        folder = packaged_model.folder()
        return folder if folder.is_dir() else None
    if _is_there(name):
        return Path(name) if Path(name).is_dir() else None
    return _from_hub_cache(name) if is_hub_id(name) else None


def resolve(name: str, token_source: str | None, reporter: Reporter) -> Path:
    """The folder of a base model, downloaded when it has to be.

    Args:
        name: a known name, a hub id (``owner/name``) or a folder.
        token_source: "-" (standard input), a file that holds the hub token, or None (HF_TOKEN or the hub's login).
        reporter: told what is downloaded.

    Raises:
        ModelNotFoundError, AccessError, OfflineError: it can't be had.
        ModelError: it is no model that kolotune can tune.
    """
    name = canonical(name)
    if name == packaged_model.NAME:
        return packaged_model.unpacked(reporter)
    if _is_there(name):
        return checked_folder(Path(name))
    if not is_hub_id(name):
        raise ModelNotFoundError(
            f"base model {name!r}: there is no such folder, and it is no hub id (owner/name)",
            f"Known by name: {', '.join(known.name for known in KNOWN)}.",
        )
    cached = _from_hub_cache(name)
    if cached is not None:
        return checked_folder(cached)
    reporter.doing(f"downloading {name}")
    return checked_folder(_download(name, read_token(token_source)))


def _is_there(name: str) -> bool:
    """Whether `name` is a file or folder; False also when no file can have such a name."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a model of that name, by its own rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return _HUB_ID.fullmatch(name) is not None


def _from_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # What was never asked for is not missing: without these patterns the Llamas' original/ would count.
        folder = Path(snapshot_download(name, local_files_only=True, **_WANTED))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    try:
        return checked_folder(folder)
    except ModelError:
        return None  # a download that was cut off: the hub's client goes on with it


def read_token(source: str | None) -> Secret | None:
    """The hub token from a file or from standard input ("-"); None leaves it to HF_TOKEN and the hub's login.

    Raises:
        ConfigError: there is nothing to read.
    """
    if source is None:
        return None
    try:
        text = sys.stdin.readline() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"hf-token: {source} can't be read", "Give a file that holds the token alone.") from None
    if not text.strip():
        raise ConfigError("hf-token: there was no token to read", "Give a file that holds the token alone.")
    return Secret(text.strip())


def _download(name: str, token: Secret | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    def fetch() -> Path:
        plain = token.reveal() if token else None
        files = [each.rfilename for each in HfApi().model_info(name, token=plain).siblings or []]
        if not any(each.endswith(".safetensors") for each in files):
            raise ModelError(
                f"{name}: has no safetensors weights", "Pickled weights can run code and are never loaded."
            )
        return Path(snapshot_download(name, token=plain, **_WANTED))

    folder = _explaining(name, fetch)
    _require_sent_bytes(name, folder)
    return folder


def _require_sent_bytes(name: str, folder: Path) -> None:
    """Holds weights that were fetched against the hashes that the hub's cache has them under; it looks at sizes only.

    Raises:
        OfflineError: a file is not what the hub has; it is removed.
    """
    for path in folder.glob("*.safetensors"):
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        if _SHA256.fullmatch(blob.name) and hash_file(path) != blob.name:
            blob.unlink()
            path.unlink()
            raise OfflineError(f"{name}: {path.name} came with other bytes than the hub has", hub_client.LATER)


def _explaining(name: str, fetch: Callable[[], Path]) -> Path:
    """Calls the hub and turns its errors into messages of their own; none repeats what the hub answered."""
    import httpx2
    from huggingface_hub import errors

    hub_client.limit_patience(name, hub_client.silence())
    try:
        return fetch()
    except errors.GatedRepoError:
        raise AccessError(
            f"{name}: is gated, and this account has no access",
            f"Ask for access on the model's page, then give the account's token (HF_TOKEN or --hf-token FILE).",  # noqa: F541
        ) from None
    except errors.RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", 404) == 401 and not os.environ.get(HUB_TOKEN):
            raise AccessError(f"{name}: the hub wants a login (401), or there is no such model") from None
        raise ModelNotFoundError(
            f"{name}: the hub has no such model, or this account may not see it", "Check the spelling, or log in."
        ) from None
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        code = hub_client.status_of(error)
        if code in (401, 403):
            raise AccessError(f"{name}: the hub refused the token ({code})") from None
        if code:
            raise OfflineError(f"{name}: the hub answered {code}", hub_client.LATER) from None
        raise hub_client.without_answer(name, error) from None


def checked_folder(folder: Path) -> Path:
    """`folder`, if it holds a model that can be tuned: config, tokenizer and whole safetensors files.

    Raises:
        ModelError: something is missing or damaged, or the weights are pickled or quantized.
    """
    config = read_model_config(folder)
    if not config.architectures:
        raise ModelError(f"{config.path}: names no architecture", "Give a folder in the Hugging Face format.")
    if config.is_quantized:
        raise ModelError(
            f"{folder}: its weights are quantized already",
            "Tune the unquantized model; --load-in-4bit quantizes it for training.",
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json)", "Copy the tokenizer's files into the folder.")
    weight_files(folder)
    return folder


def cached_models() -> list[Path]:
    """Folders of base models in kolotune's own cache."""
    folder = cache_folder("models")
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
