"""What Docker builds the image from."""

from __future__ import annotations

import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kolotune
from kolotune.engines.torchtune import environment
from kolotune.foundation.errors import ConfigError
from kolotune.runners.container import context
from kolotune.runners.container import names as places

PROJECT = Path(__file__).parents[4]


def written(**options: Path) -> dict[str, bytes]:
    held = io.BytesIO()
    context.write(held, **options)
    held.seek(0)
    with tarfile.open(fileobj=held) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar if each.isfile()}  # type: ignore[union-attr]


def pins(path: Path) -> set[str]:
    return set(re.findall(r"^[a-z0-9-]+==\S+$", path.read_text(), re.MULTILINE))


def test_it_holds_the_package_and_nothing_that_was_made_by_running_it() -> None:
    files = written()
    package = Path(kolotune.__file__).parent
    for name in ("pipeline/run.py", "cli/starter/chats.jsonl", "engines/native/__main__.py", "py.typed"):
        assert files[f"kolotune/{name}"] == (package / name).read_bytes()
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    assert {name.split("/")[0] for name in files} == {"Dockerfile", "build", "kolotune", "toolchain", "torchtune"}


def test_it_is_the_same_each_time() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    context.write(first)
    context.write(second)
    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (
            "toolchain",
            "from kolotune import llamacpp; from kolotune.foundation.reporter import PlainReporter; "
            "print(llamacpp.ensure(PlainReporter()).version)",
        ),
        ("torchtune", "from kolotune.engines.torchtune import environment; print(environment.pinned())"),
    ],
)
def test_the_modules_of_a_step_need_no_others(step: str, code: str, tmp_path: Path) -> None:
    for name, content in written().items():
        if name.startswith(f"{step}/"):
            path = tmp_path / name.removeprefix(f"{step}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    argv = [sys.executable, "-c", f"import kolotune; print(kolotune.__file__); {code}"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=_plain())
    assert done.returncode == 0, done.stderr
    file, said = done.stdout.splitlines()
    expected = {"toolchain": importlib.metadata.version("llama-cpp-python"), "torchtune": environment.pinned()}
    assert Path(file).is_relative_to(tmp_path) and said == expected[step]


def _plain() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_wheels_and_settings_go_to_the_first_stage(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    (tmp_path / "note.txt").write_bytes(b"x")
    (tmp_path / "ca").write_bytes(b"certificates")
    (tmp_path / "conf").write_bytes(b"[global]")
    plain = written()
    files = written(wheels=tmp_path, ca_bundle=tmp_path / "ca", pip_config=tmp_path / "conf")
    assert {name: files[name] for name in set(files) - set(plain)} == {
        "build/wheels/a-1-py3-none-any.whl": b"wheel",
        "build/ca.pem": b"certificates",
        "build/pip.conf": b"[global]",
    }


@pytest.mark.parametrize("option", ["wheels", "ca_bundle", "pip_config"])
def test_what_is_not_there(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        written(**{option: tmp_path / "none"})


def test_the_image_has_the_versions_that_everything_is_tested_with() -> None:
    image = pins(PROJECT / "kolotune" / "runners" / "container" / "image" / "requirements.lock")
    assert image - pins(PROJECT / "requirements.lock") == set()
    names = {each.partition("==")[0] for each in image}
    needed = {"torch", "transformers", "llama-cpp-python", "sentencepiece", "safetensors", "typer"}
    assert needed <= names and not names & {"pytest", "ruff", "peft", "mypy"}


def test_the_dockerfile_has_the_user_that_files_are_sent_for() -> None:
    text = (PROJECT / "kolotune" / "runners" / "container" / "image" / "Dockerfile").read_text()
    assert f"USER {places.USER}:{places.USER}" in text
    assert f"VOLUME {places.VOLUME}" in text and f"WORKDIR {places.HOME}" in text
    assert places.PYTHON in text and f'LABEL {places.VERSION_LABEL}="${{VERSION}}"' in text
