"""The build context of the image."""

from __future__ import annotations

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
from kolotune.foundation.installation import CONVERTER_VERSION
from kolotune.runners.container import build_context, names

PROJECT = Path(__file__).parents[4]


def files_of_context(**options: Path) -> dict[str, bytes]:
    buffer = io.BytesIO()
    build_context.write(buffer, **options)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}  # type: ignore[union-attr]


def pins(path: Path) -> set[str]:
    return set(re.findall(r"^[a-z0-9-]+==\S+$", path.read_text(), re.MULTILINE))


def test_it_contains_the_package_without_caches() -> None:
    files = files_of_context()
    package = Path(kolotune.__file__).parent
    for name in ("pipeline/run.py", "chats/starter/chats.jsonl", "engines/native/__main__.py", "py.typed"):
        assert files[f"kolotune/{name}"] == (package / name).read_bytes()
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    assert {name.split("/")[0] for name in files} == {"Dockerfile", "build", "kolotune", "toolchain", "torchtune"}


def test_it_is_always_the_same() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    build_context.write(first)
    build_context.write(second)
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
def test_a_step_has_all_modules_that_it_needs(step: str, code: str, tmp_path: Path) -> None:
    for name, content in files_of_context().items():
        if name.startswith(f"{step}/"):
            path = tmp_path / name.removeprefix(f"{step}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    argv = [sys.executable, "-c", f"import kolotune; print(kolotune.__file__); {code}"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=_plain())
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.splitlines()
    expected = {"toolchain": CONVERTER_VERSION, "torchtune": environment.pinned()}
    assert Path(file).is_relative_to(tmp_path) and version == expected[step]


def _plain() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_wheels_and_settings_are_for_the_build_only(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    (tmp_path / "note.txt").write_bytes(b"x")
    (tmp_path / "ca").write_bytes(b"certificates")
    (tmp_path / "conf").write_bytes(b"[global]")
    plain = files_of_context()
    files = files_of_context(wheels=tmp_path, ca_bundle=tmp_path / "ca", pip_config=tmp_path / "conf")
    assert {name: files[name] for name in set(files) - set(plain)} == {
        "build/wheels/a-1-py3-none-any.whl": b"wheel",
        "build/ca.pem": b"certificates",
        "build/pip.conf": b"[global]",
    }


@pytest.mark.parametrize("option", ["wheels", "ca_bundle", "pip_config"])
def test_a_missing_file_is_a_config_error(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        files_of_context(**{option: tmp_path / "none"})


def test_the_image_has_the_tested_versions() -> None:
    image = pins(PROJECT / "kolotune" / "runners" / "container" / "image" / "requirements.lock")
    assert image - pins(PROJECT / "requirements.lock") == set()
    packages = {pin.partition("==")[0] for pin in image}
    needed = {"torch", "transformers", "xllamacpp", "sentencepiece", "safetensors", "typer"}
    assert needed <= packages and not packages & {"pytest", "ruff", "peft", "mypy", "llama-cpp-python"}


def test_the_dockerfile_agrees_with_the_names() -> None:
    text = (PROJECT / "kolotune" / "runners" / "container" / "image" / "Dockerfile").read_text()
    assert f"USER {names.USER}:{names.USER}" in text
    assert f"VOLUME {names.VOLUME}" in text and f"WORKDIR {names.HOME}" in text
    assert names.PYTHON in text and f'LABEL {names.VERSION_LABEL}="${{VERSION}}"' in text
