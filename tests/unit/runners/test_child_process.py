"""Child processes of our own: events, errors of the tree, logs and exit codes. Each test starts a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from kolotune.foundation.errors import ArtifactError, ConfigError, KolotuneError, SpaceError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process

PACKAGES = str(Path(child_process.__file__).parents[2])


class Child:
    """A module that carries out a task, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.events: list[tuple[str, JsonObject]] = []

    def write(self, task: str) -> None:
        (self.folder / "kolotune_child.py").write_text(
            "import sys\nfrom kolotune.foundation import errors\nfrom kolotune.runners import child_process\n"
            f"def task():\n{textwrap.indent(textwrap.dedent(task), '    ')}\n"
            "sys.exit(child_process.carry_out(task))\n"
        )

    def run(self, task: str, *arguments: str) -> int:
        self.write(task)
        return child_process.run(
            "kolotune_child",
            *arguments,
            log=self.log,
            otherwise=ArtifactError,
            on_event=lambda name, fields: self.events.append((name, fields)),
            env={"PYTHONPATH": f"{self.folder}{os.pathsep}{PACKAGES}"},
        )


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def test_events_arrive_in_order_and_other_output_is_logged(child: Child) -> None:
    code = child.run(
        """
        print("a library speaks")
        child_process.emit("doing", text="é", step=1)
        print('{"other": "json"}')
        print('{"event": broken')
        child_process.emit("doing", text=sys.argv[1], step=2)
        print("error output", file=sys.stderr)
        """,
        "an argument",
    )
    assert code == 0
    assert child.events == [("doing", {"text": "é", "step": 1}), ("doing", {"text": "an argument", "step": 2})]
    lines = child.log.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == ["a library speaks", "error output", '{"event": broken', '{"other": "json"}']


@pytest.mark.parametrize(("kind", "hint"), [(SpaceError, "free some"), (ConfigError, "")])
def test_an_error_of_the_tree_is_raised_again(child: Child, kind: type[KolotuneError], hint: str) -> None:
    with pytest.raises(kind) as raised:
        child.run(f"raise errors.{kind.__name__}('no space on é', {hint!r})")
    assert type(raised.value) is kind
    assert (raised.value.cause, raised.value.hint) == ("no space on é", hint or kind.default_hint)
    assert "Traceback" in child.log.read_text(encoding="utf-8")
    assert not child.events


@pytest.mark.parametrize("kind", ["NewError", "KolotuneErrors", "annotations", "__name__"])
def test_an_error_of_an_unknown_class_is_of_the_class_that_the_caller_chose(child: Child, kind: str) -> None:
    with pytest.raises(ArtifactError) as raised:
        child.run(f"child_process.emit('error', kind={kind!r}, cause='it failed', hint='try this')")
    assert (raised.value.cause, raised.value.hint) == ("it failed", "try this")


def test_a_bug_is_an_exit_code_with_its_traceback_in_the_log(child: Child) -> None:
    assert child.run("raise ValueError('a bug')") == 1
    assert "ValueError: a bug" in child.log.read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_child_has_a_negative_exit_code(child: Child) -> None:
    assert child.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL


def test_an_exception_of_the_event_handler_stops_the_child(child: Child) -> None:
    child.write("import os, time; child_process.emit('started', number=os.getpid()); time.sleep(60)")
    numbers: list[int] = []

    def on_event(name: str, fields: JsonObject) -> None:
        numbers.append(int(str(fields["number"])))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child_process.run(
            "kolotune_child",
            log=child.log,
            otherwise=ArtifactError,
            on_event=on_event,
            env={"PYTHONPATH": f"{child.folder}{os.pathsep}{PACKAGES}"},
        )
    assert not psutil.pid_exists(numbers[0])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_child_ends_when_its_parent_is_killed(child: Child) -> None:
    child.write("import os, time; child_process.emit('started', number=os.getpid()); time.sleep(60)")
    program = (
        "from pathlib import Path; from kolotune.foundation.errors import ArtifactError\n"
        "from kolotune.runners import child_process\n"
        "child_process.run('kolotune_child', log=Path('log'), otherwise=ArtifactError,\n"
        "    on_event=lambda name, fields: print(fields['number'], flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{child.folder}{os.pathsep}{PACKAGES}"}
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, cwd=child.folder) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.1)
        assert process.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([process], timeout=20)
    assert not alive


def test_an_illegal_instruction_is_the_toolchains_fault_and_not_the_files(child: Child) -> None:
    with pytest.raises(ToolchainError, match="kolotune_child") as error:
        child.run("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert str(child.log) in error.value.hint
