"""Chats from the hub (``hf://datasets/OWNER/NAME``): replaced by their files, in the hub's cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kolotune.foundation.config import Config


def with_downloaded_data(config: Config) -> Config:
    """Return the config with files in place of data sets of the hub; the same object if it names none.

    Raises:
        DataError, ModelNotFoundError, AccessError, OfflineError: As in `hub_datasets.download_dataset`.
    """
    if not any("hf:" in str(path) for path in (*config.train_data, *config.eval_data)):
        return config
    train, held_out = (_files(paths, config.hf_token) for paths in (config.train_data, config.eval_data))
    return dataclasses.replace(config, train_data=train, eval_data=held_out)


def _files(paths: tuple[Path, ...], token: str | None) -> tuple[Path, ...]:
    from kolotune.base_models import hub, hub_datasets

    files: list[Path] = []
    for path in paths:
        reference = hub_datasets.reference_of(path)
        files += [path] if reference is None else hub_datasets.download_dataset(reference, hub.read_token(token))
    return tuple(files)
