"""Processes on this machine: argv unchanged, output in the log, no tokens, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.runners import local

SOURCE = str(Path(local.__file__).parents[2])


def code(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


@pytest.mark.parametrize("status", [0, 1, 7, 130])
def test_run_returns_the_exit_code(tmp_path: Path, status: int) -> None:
    assert local.run(code(f"raise SystemExit({status})"), log=tmp_path / "log") == status


def test_death_by_a_signal_is_a_negative_code(tmp_path: Path) -> None:
    assert local.run(code("import os; os.kill(os.getpid(), 9)"), log=tmp_path / "log") == -9


def test_both_outputs_are_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log"
    for word in ("one", "two"):
        local.run(code(f"import sys; print('{word} é'); print('{word} err', file=sys.stderr)"), log=log)
    assert sorted(log.read_text(encoding="utf-8").splitlines()) == ["one err", "one é", "two err", "two é"]


def test_lines_that_on_line_handles_are_not_logged(tmp_path: Path) -> None:
    seen: list[str] = []

    def on_line(line: str) -> bool:
        seen.append(line)
        return line.startswith("event")

    local.run(code("print('event 1'); print('word'); print('event 2')"), log=tmp_path / "log", on_line=on_line)
    assert seen == ["event 1", "word", "event 2"]
    assert (tmp_path / "log").read_text() == "word\n"


def test_lines_arrive_as_soon_as_they_are_written(tmp_path: Path) -> None:
    times: list[float] = []
    program = code("import time; print('a'); time.sleep(0.4); print('b')")
    local.run(program, log=tmp_path / "log", on_line=lambda _: times.append(time.monotonic()) is None)
    assert times[1] - times[0] > 0.3


def test_odd_bytes_and_long_lines_do_no_harm(tmp_path: Path) -> None:
    program = code("import sys; sys.stdout.buffer.write(b'\\xff\\x00' + b'x' * 300000 + b'\\nend')")
    assert local.run(program, log=tmp_path / "log") == 0
    assert local.last_lines(tmp_path / "log") == "end"


@pytest.mark.parametrize("hostile", ["; rm -rf ~", "$(id)", "`id`", "-rf", "a\nb", "'\"", "*", "x" * 5000, "é日本", ""])
def test_arguments_arrive_unchanged(tmp_path: Path, hostile: str) -> None:
    arrived = tmp_path / "arrived"
    program = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.argv[2].encode())"
    assert local.run([sys.executable, "-c", program, str(arrived), hostile], log=tmp_path / "log") == 0
    assert arrived.read_bytes() == hostile.encode()


def test_a_child_inherits_the_environment_without_hub_tokens(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_planted")
    monkeypatch.setenv("PLAIN", "kept")
    local.run(code("import os; print(dict(os.environ))"), log=tmp_path / "log", env={"MORE": "given"})
    text = (tmp_path / "log").read_text()
    assert "hf_planted" not in text
    assert "'PLAIN': 'kept'" in text
    assert "'MORE': 'given'" in text


def test_a_child_gets_no_input_and_the_chosen_working_directory(tmp_path: Path) -> None:
    program = code("import os, sys; print(os.getcwd()); print(repr(sys.stdin.read()))")
    local.run(program, log=tmp_path / "log", cwd=tmp_path)
    assert (tmp_path / "log").read_text().splitlines() == [str(tmp_path), "''"]


def test_modules_do_not_see_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "torch.py").write_text("raise SystemExit('hijacked')")
    argv = local.python("json.tool", "--help")
    assert local.run(argv, log=tmp_path / "log", cwd=tmp_path) == 0
    assert "hijacked" not in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError):
        local.run(code("pass"), log=tmp_path / "file" / "log")


def test_a_missing_program_is_a_system_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        local.run([str(tmp_path / "no-such-program")], log=tmp_path / "log")


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert local.last_lines(log) == ""
    log.write_bytes(b"one\n two \n\n\xff\n \n")
    assert local.last_lines(log) == "\ufffd"
    assert local.last_lines(log, 2) == "two | \ufffd"


def started(pid_file: Path) -> psutil.Process:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if pid_file.is_file() and (text := pid_file.read_text()).endswith("\n"):
            return psutil.Process(int(text))
        time.sleep(0.02)
    raise AssertionError("the child did not start")


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


PARENT = """
import signal, sys
from pathlib import Path
from kolotune.runners import local
def stop(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
child = "import os, signal, sys, time\\n" + sys.argv[3] + "\\n"
child += "open(sys.argv[1], 'w').write(f'{os.getpid()}\\\\n')\\ntime.sleep(60)\\n"
try:
    local.run([sys.executable, "-c", child, sys.argv[1]], log=Path(sys.argv[2]), ends_with_parent="watchdog" in child)
except KeyboardInterrupt:
    sys.exit(130)
"""


def parent_of(tmp_path: Path, preparation: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    pid_file = tmp_path / "pid"
    argv = [sys.executable, "-c", PARENT, str(pid_file), str(tmp_path / "log"), preparation]
    parent = subprocess.Popen(argv, start_new_session=True)
    return parent, started(pid_file)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_parent_stops_its_child(tmp_path: Path, number: int) -> None:
    parent, child = parent_of(tmp_path, "")
    os.kill(parent.pid, number)
    assert parent.wait(15) == 130
    assert has_ended(child)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(local, "_PATIENCE_SECONDS", 0.3)
    pid_file = tmp_path / "pid"
    program = f"""
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(pid_file)!r}, "w").write(f"{{os.getpid()}}\\n")
        print("ready")
        time.sleep(60)
    """

    def interrupt(line: str) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.run(code(program), log=tmp_path / "log", on_line=interrupt)
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_a_second_signal_does_not_leave_an_orphan(tmp_path: Path) -> None:
    parent, child = parent_of(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    os.kill(parent.pid, signal.SIGTERM)
    time.sleep(0.5)  # the parent waits for its child, which ignores the signal
    assert parent.poll() is None
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.wait(8) == 130
    assert has_ended(child)


@pytest.mark.parametrize("handles", [True, False])
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path, handles: bool) -> None:
    """Also when the child ignores SIGTERM."""
    preparation = "" if handles else "signal.signal(signal.SIGTERM, signal.SIG_IGN); watchdog._PATIENCE_SECONDS = 0.5"
    watch = "from kolotune.runners import watchdog; watchdog.end_with_parent()"
    parent, child = parent_of(tmp_path, f"{watch}\n{preparation}")
    time.sleep(0.3)
    assert not has_ended(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(5)
    psutil.wait_procs([child], timeout=10)
    assert has_ended(child)


def test_a_watched_child_can_exit_by_itself(tmp_path: Path) -> None:
    program = code("from kolotune.runners import watchdog; watchdog.end_with_parent(); print('done')")
    assert local.run(program, log=tmp_path / "log", ends_with_parent=True) == 0
    assert (tmp_path / "log").read_text() == "done\n"


def test_stream_passes_any_amount_of_data() -> None:
    chunks = [os.urandom(100_000) for _ in range(30)]
    assert b"".join(local.stream(["cat"], iter(chunks))) == b"".join(chunks)


def test_stream_raises_the_exit_code_and_error_output() -> None:
    program = code("import sys; print('half', flush=True); sys.exit('no space')")
    output = []
    with pytest.raises(local.ProgramError) as failed:
        for chunk in local.stream(program, [b"more than it reads"] * 100_000):
            output.append(chunk)
    assert (failed.value.code, failed.value.stderr.strip(), b"".join(output)) == (1, "no space", b"half\n")


def test_an_error_in_the_input_is_raised_by_stream() -> None:
    def broken() -> Any:
        yield b"a"
        raise ArtifactError("it changed")

    with pytest.raises(ArtifactError, match="it changed"):
        list(local.stream(["cat"], broken()))


def test_a_detached_program_outlives_its_parent(tmp_path: Path) -> None:
    child = code("import os, sys, time; time.sleep(1); print(os.getsid(0) == os.getpid())")
    program = (
        f"from pathlib import Path; from kolotune.runners import local; local.start_detached({child!r}, Path('log'))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": SOURCE})
    assert not (tmp_path / "log").read_text()
    deadline = time.monotonic() + 60
    while (tmp_path / "log").read_text() != "True\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def waiting_variables(log: Path) -> list[str]:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    local.run(code(f"import os; [print(os.environ.get(name)) for name in {names}]"), log=log)
    return log.read_text(encoding="utf-8").split()


def test_threads_of_programs_wait_briefly_before_they_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert waiting_variables(tmp_path / "log") == ["passive", "2000", "0"]
    monkeypatch.setenv("GOMP_SPINCOUNT", "300")
    assert waiting_variables(tmp_path / "other") == ["passive", "300", "0"]
