"""Convert a model folder with llama.cpp's converter: ``python -m … SCRIPT FOLDER TYPE TARGET [OPTION…]``.

A separate process, because the converter's imports take seconds and hundreds of megabytes, and because its writer is
changed here: the file comes out in the form of llama.cpp's own writer, with no second pass over it. See `writer_form`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from kolotune.runners import child_process

from . import writer_form


def main(arguments: list[str]) -> int:
    """Convert; return the exit code."""
    script, folder, gguf_type, target, *options = arguments
    return child_process.carry_out(lambda: convert(Path(script), folder, gguf_type, target, *options))


def convert(script: Path, folder: str, gguf_type: str, target: str, *options: str) -> None:
    """Run the converter's program in this process; it may end it."""
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]
    if writer_form.wanted_form() is writer_form.Form.WRITER:
        _arrange_before_writing(gguf_type)
    sys.argv = [str(script), "--outtype", gguf_type, "--outfile", target, *options, folder]
    runpy.run_path(str(script), run_name="__main__")


def _arrange_before_writing(gguf_type: str) -> None:
    import gguf

    write_header = gguf.GGUFWriter.write_header_to_file

    def arrange_and_write(writer: gguf.GGUFWriter, *arguments: Any, **named: Any) -> None:
        writer_form.arrange(writer, gguf_type)
        write_header(writer, *arguments, **named)

    gguf.GGUFWriter.write_header_to_file = arrange_and_write  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
