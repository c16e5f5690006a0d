"""Kill the writer of records at each system call: files are old or new and complete, and nothing is falsely "done"."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faults import calls
from faults.calls import Point

pytestmark = pytest.mark.skipif(bool(calls.skip_reason()), reason=calls.skip_reason() or "-")

# A miniature stage: a streamed output, a folder, then the record with the hashes of both.
_WRITER = """
import hashlib, os, sys, time
from pathlib import Path
from kolotune.foundation import files, typed_storage
from kolotune.foundation.hashing import Hasher
from kolotune.run_folder import layout, marks
folder, text = Path(sys.argv[1]), sys.argv[2]
while sys.argv[3:] and "TracerPid:\\t0\\n" in Path("/proc/self/status").read_text():
    time.sleep(0.002)
run = layout.RunFolder(folder)
marks.write_mark(run, "train", marks.MarkState.RUNNING)
hasher = Hasher()
with hasher.replacing(run.gguf) as partial, hasher.create(partial) as stream:
    for _ in range(3):
        stream.write(text.encode())
with files.replacing(run.adapter) as partial:
    partial.mkdir()
    files.write_text(partial / "weights", text)
outputs = {each.name: {"sha256": hasher.of(each)} for each in (run.gguf, run.adapter)}
typed_storage.write(run.record("train"), {"outputs": outputs, "text": text})
marks.remove_mark(run, "train")
"""


def _write(folder: Path, text: str, *traced: str) -> subprocess.Popen[bytes]:
    """Start the writer; with one more argument it waits to be traced."""
    return subprocess.Popen([sys.executable, "-c", _WRITER, str(folder), text, *traced])


def _contents(folder: Path) -> set[str]:
    """Return the texts in the folder; each must come from one writer and be complete."""
    texts = set()
    for path, times in ((folder / "Merged.gguf", 3), (folder / "adapter" / "weights", 1)):
        if path.exists():
            text = path.read_text()
            assert text in {word * times for word in ("old", "new")}, (path, text)
            texts.add(text[:3])
    return texts


@pytest.mark.parametrize("rewrites", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_kill_at_each_call_of_the_writer(rewrites: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running: list[subprocess.Popen[bytes]] = []

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    def start() -> int:
        running.append(_write(folder, "new", "traced"))
        return running[-1].pid

    def wait(pid: int) -> None:
        running[-1].wait(60)

    def check(point: Point) -> None:
        record = folder / ".kolotune" / "train.json"
        recorded = json.loads(record.read_text()) if record.exists() else None
        contents = _contents(folder)
        if recorded is not None:
            digest = hashlib.sha256((recorded["text"] * 3).encode()).hexdigest()
            assert recorded["outputs"]["Merged.gguf"]["sha256"] == digest, point
        if recorded is not None and recorded["text"] == "new":  # the record comes last
            assert contents == {"new"}, point
        assert recorded is not None or not rewrites, point
        # A second call repairs it.
        assert _write(folder, "new").wait(60) == 0, point
        assert _contents(folder) == {"new"} and json.loads(record.read_text())["text"] == "new"
        assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".old"))], point

    before = tmp_path / "before"
    before.mkdir()
    if rewrites:
        assert _write(before, "old").wait(60) == 0
    points, hits = calls.kill_at_each_call(folder, start, wait, prepare, check)
    print(f"{points} calls, killed at {hits}")
    assert points > 25 and hits == points
