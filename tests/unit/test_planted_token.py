"""A planted token is in no file, argument, message or log of a run, nor where a program has no use for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

TOKEN = "hf_PlantedTokenThatMustNotBeSeenAnywhere"
CHATS = "".join(
    f'{{"messages": [{{"role": "user", "content": "q{n}"}}, {{"role": "assistant", "content": "a{n}"}}]}}\n'
    for n in range(12)
)
# A bug in the middle of a verb: Python prints the traceback.
CRASH = """
import sys
from kolotune.base_models import hub
from kolotune.stages import prepare
source = sys.argv.pop()
def broken(context, reporter):
    token = hub.read_token(source)
    raise RuntimeError(f"a bug, with {token} and {context.config}")
prepare.run = broken
from kolotune.__main__ import main
main()
"""


class Watcher(threading.Thread):
    """Read arguments and environments of the descendants of a process, repeatedly."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.is_running = root, True
        self.arguments: set[bytes] = set()
        self.environments: dict[int, bytes] = {}

    def run(self) -> None:
        import psutil

        while self.is_running:
            with contextlib.suppress(psutil.Error):
                for each in psutil.Process(self.root).children(recursive=True):
                    with contextlib.suppress(OSError):
                        self.arguments.add(Path(f"/proc/{each.pid}/cmdline").read_bytes())
                        self.environments[each.pid] = Path(f"/proc/{each.pid}/environ").read_bytes()
            with contextlib.suppress(OSError):
                self.arguments.add(Path(f"/proc/{self.root}/cmdline").read_bytes())
            time.sleep(0.02)


def watched(argv: list[str], folder: Path, typed: str, **env: str) -> tuple[int, str, Watcher]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    started = subprocess.Popen(
        [sys.executable, *argv],
        cwd=folder,
        env={**clean, **env},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    watcher = Watcher(started.pid)
    watcher.start()
    output = started.communicate(typed, timeout=550)[0]
    watcher.is_running = False
    watcher.join()
    return started.returncode, output, watcher


VERBS = ["prepare", pytest.param("run", marks=pytest.mark.slow), pytest.param("torchtune", marks=pytest.mark.slow)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("source", ["environment", pytest.param("standard input", marks=pytest.mark.slow), "file"])
def test_a_planted_token_leaks_nowhere(verb: str, source: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text(TOKEN + "\n")
    (folder / "chats.jsonl").write_text(CHATS)
    options = ["--base-model", str(tiny_base), "--max-seq-length", "64"]
    options += [] if verb == "prepare" else ["--epochs", "1"]
    options += ["--engine", "torchtune"] if verb == "torchtune" else []
    options += {"file": ["--hf-token", str(tmp_path / "secret")], "standard input": ["--hf-token", "-"]}.get(source, [])
    env = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN} if source == "environment" else {}
    word = "run" if verb == "torchtune" else verb
    line = [word, "chats.jsonl", "--output-dir", "good", *options]
    wrong = [word, "none.jsonl", "--output-dir", "bad", *options]
    base = ["--base-model", str(tiny_base)]
    crash = ["-c", CRASH, "prepare", "chats.jsonl", "--output-dir", "crash", *base, str(tmp_path / "secret")]
    for argv, code in ((["-m", "kolotune", *line], 0), (["-m", "kolotune", *wrong], 3), (crash, 1)):
        found, output, watcher = watched(argv, folder, TOKEN + "\n" if source == "standard input" else "", **env)
        assert found == code, output
        assert ("RuntimeError: a bug, with ********" in output) == (argv is crash)
        assert TOKEN not in output
        assert not [each for each in watcher.arguments if TOKEN.encode() in each]
        assert watcher.arguments
        if argv is not crash and code == 0:
            assert watcher.environments, "no other program was seen"
        assert not [pid for pid, each in watcher.environments.items() if TOKEN.encode() in each]
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
