"""llama.cpp's own quantizer, of llama-cpp-python in an environment of its own, which is compiled on first use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environments
import numpy as np

from kolotune.foundation.quantization_types import FILE_TYPES


class LlamaCppQuantizer:
    """A process that quantizes one file after the other: the tables of some types take long to make."""

    def __init__(self, child: subprocess.Popen[str], folder: Path) -> None:
        self._child, self._folder = child, folder

    def quantize(self, source: Path, target: Path, file_type: str, matrix: Mapping[str, np.ndarray]) -> bool:
        """Quantize a file; return False when llama.cpp refuses to."""
        return not self._answer(source, file_type, matrix, target=str(target))["code"]

    def types(self, source: Path, file_type: str, matrix: Mapping[str, np.ndarray]) -> dict[str, str] | None:
        """Return the types that llama.cpp chooses; None when it refuses."""
        answer = self._answer(source, file_type, matrix)
        return None if answer["code"] else answer["types"]

    def _answer(
        self, source: Path, file_type: str, matrix: Mapping[str, np.ndarray], **more: object
    ) -> Mapping[str, Any]:
        job = {"source": str(source), "type": FILE_TYPES[file_type], **more}
        if matrix:
            means: dict[str, Any] = {**matrix}
            np.savez(self._folder / "matrix.npz", **means)
            job["matrix"] = str(self._folder / "matrix.npz")
        assert self._child.stdin is not None and self._child.stdout is not None
        print(json.dumps(job), file=self._child.stdin, flush=True)
        answer: Mapping[str, Any] = json.loads(self._child.stdout.readline())
        return answer


@contextmanager
def llamacpp_quantizer(folder: Path) -> Iterator[LlamaCppQuantizer]:
    """Start the process; `folder` is for its temporary files."""
    argv = [environments.ensure("llama_cpp") / "python", environments.PEERS / "quantize.py"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield LlamaCppQuantizer(child, folder)
        finally:
            child.kill()
