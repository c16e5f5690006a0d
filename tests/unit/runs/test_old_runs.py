"""A run that an earlier version made is still done, matches its manifest, and can be rebuilt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import environments
import pytest
from support.tiny import chat_line

from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import StageState, read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import saved_config
from kolotune.runs.rebuild import rebuild
from kolotune.runs.verify import verify

pytestmark = pytest.mark.slow
OLD_VERSION = "9e576c5"  # the last one whose records were not typed
_REPOSITORY = Path(__file__).parents[3]
_OPTIONS = ["--epochs", "1", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off", "--eval-split", "0.1"]


@pytest.fixture(scope="module")
def old_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old version's package, and llama-cpp-python, which it needs."""
    folder = tmp_path_factory.mktemp("old version")
    archive = folder / "package.tar"
    command = ["git", "-C", str(_REPOSITORY), "archive", "--output", str(archive), OLD_VERSION, "kolotune"]
    if shutil.which("git") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"commit {OLD_VERSION} is not in this clone: fetch its whole history (git fetch --unshallow)")
    shutil.unpack_archive(archive, folder, filter="data")
    (packages,) = environments.ensure("llama_cpp").parent.glob("lib/python*/site-packages")
    for path in (*packages.glob("llama_cpp*"), *packages.glob("diskcache*")):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (["--quantization", "none"], 7),
        (["--quantization", "Q8_0", "--no-compare"], 6),
        (["--quantization", "Q8_0", "--no-compare", "--lean"], 4),
    ],
    ids=["compared", "quantized", "lean"],
)
def test_an_old_run_is_done_verified_and_rebuilt(
    options: Sequence[str],
    stages: int,
    old_version: Path,
    tiny_base: Path,
    tmp_path: Path,
    reporter: PlainReporter,
    one_thread: None,
) -> None:
    run = _run_old_version(old_version, tiny_base, tmp_path, options)
    assert [status.state for status in read_status(run)] == [StageState.DONE] * stages
    findings = verify(run)
    assert (findings.differences, findings.unchecked) == ([], [])
    before = {path: path.stat().st_mtime_ns for path in run.state.glob("*.json")}
    records = {path: mtime for path, mtime in before.items() if (run.root / path.name) != run.choices}
    run_pipeline(saved_config(run), reporter)
    assert [status.state for status in read_status(run)] == [StageState.DONE] * stages
    for stage in {"prepare", "train", "merge", "convert", "quantize", "modelfile"} & {path.stem for path in records}:
        assert run.record(stage).stat().st_mtime_ns == records[run.record(stage)], "it ran again"
    rebuilt = rebuild(run.manifest, tmp_path / "rebuilt", reporter)
    is_compared = "compare" in {path.stem for path in records}  # by another library then, so it is in neither
    assert rebuilt.different == [] and len(rebuilt.same) >= stages - 1 - is_compared


def _run_old_version(package: Path, base: Path, folder: Path, options: Sequence[str]) -> RunFolder:
    chats = folder / "chats.jsonl"
    chats.write_text("".join(chat_line(number) for number in range(40)), encoding="utf-8")
    run = RunFolder(folder / "run")
    command = [sys.executable, "-m", "kolotune", "run", str(chats), "--base-model", str(base)]
    # Not from here: the working folder comes before PYTHONPATH.
    done = subprocess.run(
        [*command, "--output-dir", str(run.root), *_OPTIONS, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (package / "kolotune" / "foundation").exists()
    return run
