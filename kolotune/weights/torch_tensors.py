"""Tensors of safetensors files, read one at a time with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.free_memory import release_mapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorFiles:
    """The tensors of a model by name, each read when it is needed.

    Raises:
        ArtifactError: a file is damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._handles: dict[str, Any] = {}  # safetensors' handles have no public type
        for path in files:
            try:
                handle: Any = safe_open(path, framework="pt")
                self._handles |= dict.fromkeys(handle.keys(), handle)
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{path}: can't be read: {error}", "Download the model again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype.

        Raises:
            ArtifactError: there is none of that name.
        """
        if name not in self._handles:
            raise ArtifactError(f"the model has no tensor {name}", "Download the model again.")
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Return a copy of a tensor, in another dtype or on another device if given; the file takes no memory then.

        Raises:
            ArtifactError: there is none of that name.
        """
        stored = self.read(name)
        tensor = stored.to(device, dtype or stored.dtype, copy=True)
        release_mapped(stored.data_ptr(), stored.nbytes)
        return tensor
