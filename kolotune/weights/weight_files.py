"""The safetensors files of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ModelError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model; the header of each is checked.

    Raises:
        ModelError: there are none, one that the index names is missing, or a header is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(typed_storage.read(_Index, index).weight_map.values()))
        except typed_storage.StorageError:
            raise ModelError(f"{index}: can't be read", "Download the model again.") from None
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index}: names files outside the folder", "Download the model from its own page.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next((path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")), "")
        reason = f": only pickled ones ({pickled}), which can run code and are never loaded" if pickled else ""
        raise ModelError(f"{folder}: has no safetensors weights{reason}", "Convert the weights to safetensors first.")
    for path in files:
        check_file(path)
    return files


def check_file(path: Path) -> None:
    """Check that a safetensors file is whole.

    Raises:
        ModelError: it is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():  # an OSError where the index has a name that no file can have
            raise ModelError(f"{path}: is missing, though the index names it", "Download the model again.")
        with safe_open(path, framework="numpy") as handle:
            handle.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error})", "Download the model again.") from None
