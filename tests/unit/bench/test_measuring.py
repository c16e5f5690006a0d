"""The measurements measure the right thing."""

from __future__ import annotations

import sys
from pathlib import Path

import measuring
import pytest

HOLDS_200_MB = "import time; x = b'1' * 200_000_000; time.sleep(0.4)"
CHILD_HOLDS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_200_MB!r}], check=True)"


@pytest.mark.parametrize("program", [HOLDS_200_MB, CHILD_HOLDS])
def test_memory_includes_child_processes(tmp_path: Path, program: str) -> None:
    measured = measuring.measure([sys.executable, "-c", program], tmp_path / "log")
    assert 200 <= measured.anonymous_mb < 260
    assert measured.anonymous_mb <= measured.peak_mb < 300
    assert measured.seconds > 0.4


def test_mapped_files_count_in_the_peak_but_not_as_anonymous(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"1" * 100_000_000)
    program = (
        "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        "[m[at] for at in range(0, len(m), 4096)]; time.sleep(1.5)"
    )
    measured = measuring.measure([sys.executable, "-c", program, str(data)], tmp_path / "log")
    assert measured.anonymous_mb < 60
    assert 100 <= measured.peak_mb < 180


def test_a_failure_is_reported_with_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3\n.*it broke"):
        measuring.measure([sys.executable, "-c", "print('it broke'); exit(3)"], tmp_path / "log")


def test_until_ends_the_child_and_its_children(tmp_path: Path) -> None:
    seen = tmp_path / "pid"
    program = (
        "import subprocess, sys, os; child = subprocess.Popen(['sleep', '60']);"
        f"open({str(seen)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    measured = measuring.measure([sys.executable, "-c", program], tmp_path / "log", until=seen.exists)
    assert measured.seconds < 30
    state = Path("/proc", seen.read_text(), "stat")
    assert not state.exists() or " Z " in state.read_text()


def test_results_are_read_back_and_missed_targets_fail(tmp_path: Path) -> None:
    result = measuring.Result("speed", "Speed", versions={"trl": "1"}, notes=["a note"])
    result.tables.append(measuring.Table("t", ["who", "tokens/s"], [["a", 1234.5], ["b", 0.25]]))
    result.at_least("faster", 9.9, 10)
    result.at_most("memory", 5.0, 6, " GB")
    result.finish(tmp_path / "r.json")
    loaded = measuring.read_result(tmp_path / "r.json")
    assert loaded == result
    assert [figure.passed for figure in loaded.figures] == [False, True]
    assert "| faster | at least 10 x | 9.90 x | **fail** |" in loaded.markdown()
    assert "| a | 1,234 |" in loaded.markdown()
