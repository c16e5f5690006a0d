"""Values of options in canonical form: absolute paths, lists from comma lists, quantizations in capitals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kolotune.foundation.chat_paths import files_of
from kolotune.foundation.quantization_types import canonical_name

from .option import Kind
from .options import OPTIONS


def normalize(name: str, value: object, folder: Path) -> object:
    """Return the value of an option in canonical form.

    A value of the wrong type is returned as it is; validation refuses it later.

    Args:
        name: the option.
        value: as a flag, YAML or a caller gives it.
        folder: where relative paths start.
    """
    kind = OPTIONS[name].kind
    if kind is Kind.CHAT_FILES:
        files = [value] if isinstance(value, (str, Path)) else value
        if not isinstance(files, (list, tuple)):
            return files
        paths = [_absolute(each, folder) for each in files]
        return tuple([file for path in paths for file in (files_of(path) if isinstance(path, Path) else (path,))])
    if kind in (Kind.FILE, Kind.FOLDER):
        return _absolute(value, folder)
    if kind is Kind.ADAPTER:
        return _adapter_of(_absolute(value, folder))
    if kind is Kind.SECRET_SOURCE and value != "-":
        return str(_absolute(value, folder))
    if kind is Kind.BASE_MODEL and isinstance(value, str) and _is_folder_name(name, value, folder):
        return str(_absolute(value, folder))
    if kind in (Kind.NAMES, Kind.QUANTIZATIONS):
        return _split_names(value, is_quantization=kind is Kind.QUANTIZATIONS)
    if kind is Kind.PARAMETERS and isinstance(value, Mapping):
        return tuple(f"{key}={setting}" for key, setting in value.items())
    if kind.is_repeatable:
        return (value,) if isinstance(value, str) else value
    return str(value) if kind is Kind.DATE else value


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False also for an impossible name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _adapter_of(folder: object) -> object:
    """Return the folder of an adapter; for a run folder, that of its adapter."""
    inside = folder / "adapter" if isinstance(folder, Path) else None
    return inside if inside is not None and exists(inside) else folder


def _is_folder_name(name: str, value: str, folder: Path) -> bool:
    """Whether a base model is given as a path: written as one, or there is such a folder."""
    if value.startswith(("./", "../", "/", "~", ".\\", "..\\")):
        return True
    return value.lower() != OPTIONS[name].default and bool(value) and exists(Path(folder, value))


def _split_names(value: object, *, is_quantization: bool) -> object:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return items
    names: Iterable[str] = (part.strip() for each in items for part in str(each).split(",") if part.strip())
    if is_quantization:
        names = map(canonical_name, names)
    return tuple(dict.fromkeys(names))


def _absolute(value: object, folder: Path) -> object:
    return Path(folder, Path(value).expanduser()).absolute() if isinstance(value, (str, Path)) else value
