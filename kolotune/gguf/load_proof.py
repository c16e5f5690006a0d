"""Prove that llama.cpp's library loads a GGUF before its weights exist: ``python -m … GGUF [vocabulary]``.

The converter and the library have different versions, or the user's own; what one writes, the other need not know. So
the library loads the file with weights that are a hole in the disk, which shows it every field, and the names and
shapes of all tensors. A separate process, because the library may abort.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import shared_libraries, typed_storage
from kolotune.foundation.errors import ToolchainError
from kolotune.llamacpp import library
from kolotune.llamacpp.log import collect_problems
from kolotune.runners import child_process, local

_PROVEN = "loaded.json"
_VOCABULARY = "vocabulary"
_PROBLEM = re.compile(r"error loading model: (.*)")


@dataclass(frozen=True)
class _Proof:
    """The file `_PROVEN` in a plan's folder: what loaded the GGUF."""

    library: str


def is_proven(folder: Path) -> bool:
    """Whether the library of this machine is known to load the GGUF of a plan; never of a user's own, which may change.

    Raises:
        ToolchainError: there is no library.
    """
    proof = _Proof(shared_libraries.find().origin)
    try:
        return shared_libraries.own_folder() is None and typed_storage.read(_Proof, folder / _PROVEN) == proof
    except (OSError, typed_storage.StorageError):
        return False


def remember(folder: Path) -> None:
    """Keep with a plan that the library loads its GGUF."""
    if folder.is_dir():
        typed_storage.write(folder / _PROVEN, _Proof(shared_libraries.find().origin))


def prove_loadable(gguf: Path, log: Path, *, vocabulary: bool = False) -> None:
    """Let llama.cpp's library load a GGUF whose weights may be zeros.

    Args:
        gguf: the file.
        log: receives the library's messages.
        vocabulary: it has no tensors.

    Raises:
        ToolchainError: the library can't load it.
    """
    options = [_VOCABULARY] if vocabulary else []
    code = child_process.run(__name__, str(gguf), *options, log=log, otherwise=ToolchainError)
    if code != 0:
        raise ToolchainError(f"llama.cpp can't load the model's GGUF: {local.last_lines(log)}", f"The log is {log}.")


def load(gguf: Path, *, vocabulary: bool = False) -> None:
    """Load a GGUF in this process, without memory for its weights.

    Raises:
        ToolchainError: the library can't load it.
    """
    functions = library.load()
    with collect_problems() as problems:
        functions.llama_backend_init()
        parameters = functions.llama_model_default_params()
        parameters.n_gpu_layers, parameters.load_mode = 0, library.READ_WHOLE
        parameters.no_alloc, parameters.vocab_only = not vocabulary, vocabulary
        model = functions.llama_model_load_from_file(os.fsencode(gguf), parameters)
    if not model:
        said = "\n".join(problems)
        reason = match[1] if (match := _PROBLEM.search(said)) else " ".join(problems)
        raise ToolchainError(
            f"llama.cpp can't load the model's GGUF: {reason}",
            "Use a base model that it supports, or a newer llama.cpp: set LLAMA_CPP_DIR to its folder.",
        )
    functions.llama_model_free(model)


def main(arguments: list[str]) -> int:
    """Load; return the exit code."""
    path, *options = arguments
    return child_process.carry_out(lambda: load(Path(path), vocabulary=options == [_VOCABULARY]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
