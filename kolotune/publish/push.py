"""Push a result to the hub in one commit. Nothing else in kolotune uploads anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kolotune.base_models import hub_errors, hub_limits
from kolotune.foundation.errors import AccessError, HubError, KolotuneError, ModelNotFoundError, OfflineError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import Secret

from .model_card import ResultKind
from .upload import Upload

_PATIENCE = 6  # wait so many times as long as in a download: the hub processes a commit before it answers


def push(
    upload: Upload, repository: str, kind: ResultKind, token: Secret | None, public: bool, reporter: Reporter
) -> str:
    """Create the repository if it does not exist, commit the files, and return the commit's URL.

    Args:
        upload: the files.
        repository: ``owner/name``.
        kind: for the commit's message.
        token: for the hub; None to use HF_TOKEN or the saved login.
        public: whether the repository may be public. If not, an existing public repository is refused.
        reporter: shows what is being done.

    Raises:
        AccessError, ModelNotFoundError, OfflineError, HubError: the hub refused; the message contains no secret.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub_limits.limit_waiting(repository, _PATIENCE * hub_limits.silence_seconds())
    api = HfApi(token=token.reveal() if token else None, library_name="kolotune")
    with _translated_errors(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise HubError(
                f"{repository}: the repository is public", "Push with --public, or make it private on the hub."
            )
        reporter.doing(f"uploading {len(upload.files)} files, {format_size(upload.size)}")
        operations = [CommitOperationAdd(name, file) for name, file in upload.files.items()]
        info = api.create_commit(repository, operations, commit_message=f"{kind}, by kolotune")
    return str(info.commit_url)


@contextmanager
def _translated_errors(repository: str) -> Iterator[None]:
    """Raise errors of the hub's client as errors of kolotune."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except KolotuneError:
        raise
    except (errors.HfHubHTTPError, httpx2.HTTPError, RuntimeError, ValueError, OSError) as error:
        raise _error_of(repository, hub_errors.status_of(error), error) from None


def _error_of(repository: str, code: int, error: Exception) -> KolotuneError:
    from huggingface_hub import errors

    if code == 401:
        return AccessError(f"{repository}: the hub requires a login, or the token is not valid (401)")
    if code == 403:
        return AccessError(
            f"{repository}: the token has no write access (403)", "Use a token with write access for this owner."
        )
    if code == 404:
        return ModelNotFoundError(
            f"{repository}: there is no such repository, or this account has no access to it (404)",
            "Check the owner's name.",
        )
    if code in (409, 412):
        return HubError(f"{repository}: changed by someone else at the same time ({code}); nothing was committed")
    if code in (413, 507):
        return HubError(f"{repository}: not enough space on the hub ({code})", "Push less, or raise the quota there.")
    if code >= 500 or code == 429:
        return OfflineError(f"{repository}: the hub answered {code}", "Try again later; uploaded files are kept.")
    if code:
        return HubError(f"{repository}: the hub refused the request ({code})")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return AccessError(f"{repository}: a hub token is needed to push")
    if isinstance(error, ValueError):
        return HubError(f"{repository}: unexpected answer from the hub: {str(error).splitlines()[0]}")
    return hub_errors.connection_error(repository, error)
