"""Measurements measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import measuring
import pytest

HOLDS_200_MB = "import time; x = b'1' * 200_000_000; time.sleep(0.4)"
CHILD_HOLDS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_200_MB!r}], check=True)"


@pytest.mark.parametrize("program", [HOLDS_200_MB, CHILD_HOLDS])
def test_the_memory_of_a_process_and_of_its_children_is_seen(tmp_path: Path, program: str) -> None:
    found = measuring.measure([sys.executable, "-c", program], tmp_path / "log")
    assert 200 <= found.anonymous_mb < 260
    assert found.anonymous_mb <= found.peak_mb < 300
    assert found.seconds > 0.4


def test_mapped_files_count_in_the_peak_but_are_not_anonymous(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"1" * 100_000_000)
    program = (
        "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        "[m[at] for at in range(0, len(m), 4096)]; time.sleep(1.5)"
    )
    found = measuring.measure([sys.executable, "-c", program, str(data)], tmp_path / "log")
    assert found.anonymous_mb < 60
    assert 100 <= found.peak_mb < 180


def test_a_child_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3\n.*it broke"):
        measuring.measure([sys.executable, "-c", "print('it broke'); exit(3)"], tmp_path / "log")


def test_a_child_and_its_children_end_when_enough_was_seen(tmp_path: Path) -> None:
    seen = tmp_path / "pid"
    program = (
        "import subprocess, sys, os; child = subprocess.Popen(['sleep', '60']);"
        f"open({str(seen)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    found = measuring.measure([sys.executable, "-c", program], tmp_path / "log", until=seen.exists)
    assert found.seconds < 30
    state = Path("/proc", seen.read_text(), "stat")
    assert not state.exists() or " Z " in state.read_text()


def test_results_come_back_from_json_and_figures_fail_honestly(tmp_path: Path) -> None:
    result = measuring.Result("speed", "Speed", versions={"trl": "1"}, notes=["a note"])
    result.tables.append(measuring.Table("t", ["who", "tokens/s"], [["a", 1234.5], ["b", 0.25]]))
    result.at_least("faster", 9.9, 10)
    result.at_most("memory", 5.0, 6, " GB")
    result.finish(tmp_path / "r.json")
    again = measuring.read_result(tmp_path / "r.json")
    assert again == result
    assert [each.passed for each in again.figures] == [False, True]
    assert "| faster | at least 10 x | 9.90 x | **fail** |" in again.markdown()
    assert "| a | 1,234 |" in again.markdown()
