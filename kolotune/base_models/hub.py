"""Base models on the hub: names, tokens, the hub's own cache, and downloads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kolotune.foundation.errors import AccessError, ConfigError, ModelError, ModelNotFoundError, OfflineError
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.secrets import HUB_TOKEN, Secret

from . import hub_errors, hub_limits
from .model_folder import check_model_folder

# All that training and export read; never pickles, and never the second copy of the weights in original/.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*"]
_IGNORED = ["original/*", "*/*.safetensors", "onnx/*", "*.bin", "*.pth", "*.pt"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether the hub's rules allow a model of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return _HUB_ID.fullmatch(name) is not None


def find_cached_model(name: str) -> Path | None:
    """Return the folder of a complete model in the hub's cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # With the same patterns as for the download: otherwise the Llamas' original/ would count as missing.
        folder = snapshot_download(name, local_files_only=True, allow_patterns=_FILES, ignore_patterns=_IGNORED)
        return check_model_folder(Path(folder))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    except ModelError:
        return None  # an interrupted download: the hub's client resumes it


def read_token(source: str | None) -> Secret | None:
    """Read the hub token from a file or from standard input ("-"); None leaves it to HF_TOKEN and the hub's login.

    Raises:
        ConfigError: there is no token to read.
    """
    if source is None:
        return None
    try:
        text = sys.stdin.readline() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"hf-token: {source} can't be read", "Give a file that contains only the token.") from None
    if not text.strip():
        raise ConfigError("hf-token: no token in the input", "Give a file that contains only the token.")
    return Secret(text.strip())


def download_model(name: str, token: Secret | None) -> Path:
    """Download a model into the hub's cache; a download that was interrupted is resumed.

    Raises:
        ModelNotFoundError, AccessError, OfflineError: the hub refused it or can't be reached.
        ModelError: it has no safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download

    plain = token.reveal() if token else None
    with explained_errors(name):
        files = [sibling.rfilename for sibling in HfApi().model_info(name, token=plain).siblings or []]
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(
                f"{name}: has no safetensors weights", "Pickled weights can run code and are never loaded."
            )
        folder = Path(snapshot_download(name, token=plain, allow_patterns=_FILES, ignore_patterns=_IGNORED))
    check_hashes(name, folder.glob("*.safetensors"))
    return folder


def check_hashes(name: str, files: Iterable[Path]) -> None:
    """Compare downloaded files with the hashes that name them in the hub's cache; the hub's client compares sizes.

    Raises:
        OfflineError: a file differs from the hub's; it is removed.
    """
    for path in files:
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        if _SHA256.fullmatch(blob.name) and hash_file(path) != blob.name:
            blob.unlink()
            path.unlink()
            raise OfflineError(f"{name}: {path.name} arrived with other bytes than the hub has", hub_errors.TRY_LATER)


@contextmanager
def explained_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Turn the hub client's errors into errors of the tree; none repeats the hub's text.

    Args:
        name: what is asked for.
        kind: what it is, "model" or "data set".
    """
    import httpx2
    from huggingface_hub import errors

    hub_limits.limit_waiting(name, hub_limits.silence_seconds())
    try:
        yield
    except errors.GatedRepoError:
        raise AccessError(
            f"{name}: is gated, and this account has no access",
            f"Ask for access on the {kind}'s page, then give the account's token ({HUB_TOKEN} or --hf-token FILE).",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(
            f"{name}: the hub has no such revision of this {kind}", "Check the spelling."
        ) from None
    except errors.RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", 404) == 401 and not os.environ.get(HUB_TOKEN):
            raise AccessError(f"{name}: the hub requires a login (401), or there is no such {kind}") from None
        raise ModelNotFoundError(
            f"{name}: the hub has no such {kind}, or this account may not see it", "Check the spelling, or log in."
        ) from None
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        code = hub_errors.status_of(error)
        if code in (401, 403):
            raise AccessError(f"{name}: the hub refused the token ({code})") from None
        if code:
            raise OfflineError(f"{name}: the hub answered {code}", hub_errors.TRY_LATER) from None
        raise hub_errors.connection_error(name, error) from None
