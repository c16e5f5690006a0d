"""The lock of a run folder: one process at a time works in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.runs import config_of, hashes, states

from kolotune.foundation.errors import RunFolderError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import MarkState, write_mark

LOCK_IT = """
import sys, time
from pathlib import Path
from kolotune.pipeline.lock import locked
from kolotune.run_folder.layout import RunFolder
with locked(RunFolder(Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run_copy: RunFolder) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", LOCK_IT, str(run_copy.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(
    run_copy: RunFolder, holder: subprocess.Popen[str], reporter: PlainReporter
) -> None:
    before = hashes(run_copy)
    with pytest.raises(RunFolderError, match=rf"is in use by process {holder.pid}$") as error:
        run_pipeline(config_of(run_copy, system="x"), reporter)
    assert error.value.exit_code == 12
    assert "Wait" in error.value.hint
    write_mark(run_copy, "modelfile", MarkState.RUNNING)
    run_copy.modelfile().unlink()
    assert states(run_copy)["modelfile"] == "running"
    holder.kill()  # its name stays in the folder
    holder.wait()
    assert states(run_copy)["modelfile"] == "interrupted"
    run_pipeline(config_of(run_copy), reporter, ["modelfile"])
    assert states(run_copy)["modelfile"] == "done"
    assert hashes(run_copy) == before
    assert not run_copy.lock_holder.exists()


def test_reading_a_locked_folder_is_allowed_and_does_not_unlock_it(
    run_copy: RunFolder, holder: subprocess.Popen[str], reporter: PlainReporter
) -> None:
    for _ in range(3):
        assert set(states(run_copy).values()) == {"done"}
    with pytest.raises(RunFolderError):
        run_pipeline(config_of(run_copy), reporter)
