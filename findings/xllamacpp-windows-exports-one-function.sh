#!/usr/bin/env bash
# The Windows wheel of xllamacpp 2026.10.11549 exports one function; the Linux wheel of the same release exports all of llama.cpp.
#
# A good engineer expects: one release, one extension module, so what `ctypes` can call on Linux, it can call on Windows.
# What happens: on Linux (x86-64, arm64) the module's shared object exports llama.cpp's and ggml's C functions, llama_decode and
# ggml_quantize_chunk among them, since symbols are visible by default there. On Windows symbols are hidden by default: the
# .pyd exports PyInit_xllamacpp and nothing else, so `ctypes.CDLL(...).llama_decode` is an AttributeError.
# Seen on Python 3.11, Linux, 2026-11-29. Nothing is loaded or run: the tables of exports are read from the files.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pefile==2024.8.26 pyelftools==0.33 2>/dev/null
for platform in win_amd64 manylinux2014_x86_64 manylinux2014_aarch64; do
  "$work/venv/bin/pip" download -q --no-deps --only-binary :all: --platform "$platform" --python-version 3.11 \
    --dest "$work/$platform" xllamacpp==2026.10.11549 2>/dev/null
  python3 -m zipfile -e "$work/$platform"/*.whl "$work/$platform"
done

"$work/venv/bin/python" - "$work" <<'P'
import sys
from pathlib import Path
import pefile
from elftools.elf.elffile import ELFFile

work, wanted = Path(sys.argv[1]), ("llama_decode", "llama_model_load_from_file", "ggml_quantize_chunk")
exported = {}
for platform in ("manylinux2014_x86_64", "manylinux2014_aarch64"):
    (module,) = (work / platform / "xllamacpp").glob("*.so")
    with module.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        exported[platform] = {symbol.name for symbol in table.iter_symbols() if symbol["st_shndx"] != "SHN_UNDEF"}
(module,) = (work / "win_amd64" / "xllamacpp").glob("*.pyd")
exported["win_amd64"] = {symbol.name.decode() for symbol in pefile.PE(str(module)).DIRECTORY_ENTRY_EXPORT.symbols}
for platform, names in exported.items():
    print(f"{platform}: {len(names)} exports, of {', '.join(wanted)}: {len(names.intersection(wanted))}")
print("all of Windows:", *exported["win_amd64"])
on_linux = all(exported[platform].issuperset(wanted) for platform in exported if platform != "win_amd64")
sys.exit(0 if on_linux and exported["win_amd64"] == {"PyInit_xllamacpp"} else "this finding is out of date")
P
