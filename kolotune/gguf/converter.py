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

from . import converter_settings, writer_form


def main(arguments: list[str]) -> int:
    """Convert; return the exit code."""
    script, folder, gguf_type, target, *options = arguments
    return child_process.carry_out(lambda: convert(Path(script), folder, gguf_type, target, *options))


def convert(script: Path, folder: str, gguf_type: str, target: str, *options: str) -> None:
    """Run the converter's program in this process; it may end it."""
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]
    if writer_form.wanted_form() is writer_form.Form.WRITER:
        _arrange_before_writing(gguf_type)
    if (script.parent / "conversion").is_dir():  # a user's own may be older, in one file
        _adapt(Path(folder))
    sys.argv = [str(script), "--outtype", gguf_type, "--outfile", target, *options, folder]
    runpy.run_path(str(script), run_name="__main__")


def _adapt(folder: Path) -> None:
    import conversion  # type: ignore[import-not-found]

    converter_settings.give_file_settings(conversion.ModelBase)
    find_class = conversion.get_model_class

    def get_model_class(*arguments: Any, **named: Any) -> Any:
        model_class = find_class(*arguments, **named)
        converter_settings.leave_out_missing_drafts(model_class, folder)
        return model_class

    conversion.get_model_class = get_model_class


def _arrange_before_writing(gguf_type: str) -> None:
    import gguf

    write_header = gguf.GGUFWriter.write_header_to_file

    def arrange_and_write(writer: gguf.GGUFWriter, *arguments: Any, **named: Any) -> None:
        writer_form.arrange(writer, gguf_type)
        write_header(writer, *arguments, **named)

    gguf.GGUFWriter.write_header_to_file = arrange_and_write  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
