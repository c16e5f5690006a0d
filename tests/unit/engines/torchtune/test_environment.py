"""torchtune's environment is used if it is complete, installed by one process at a time, or refused with a reason."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kolotune.engines.torchtune import environment
from kolotune.foundation.errors import OfflineError, ToolchainError

PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the environment belongs in an empty cache."""
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    return tmp_path / "cache" / "torchtune" / environment.pinned()


def fake_environment(folder: Path, requirements: str | None) -> Path:
    """Make a folder that looks like an environment installed from these requirements; None: like an incomplete one."""
    python = environment._python_of(folder)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    if requirements is not None:
        (folder / "kolotune.json").write_text(json.dumps({"requirements": requirements}), encoding="utf-8")
    return folder


def set_requirements(requirements: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the list of requirements."""
    file = tmp_path / "requirements.txt"
    file.write_text(requirements, encoding="utf-8")
    monkeypatch.setattr(environment, "REQUIREMENTS", file)


def test_every_package_is_pinned() -> None:
    lines = environment.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert all(PIN.fullmatch(line) for line in wanted) and len(wanted) == len({line.lower() for line in wanted})
    pins = dict(line.split("==") for line in wanted)
    assert pins["torch"] == "2.13.0" and pins["torchtune"] == "0.6.1"
    assert tuple(map(int, pins["torchao"].split("."))) < (0, 16)


def test_the_fingerprint_is_that_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for text in ("a==1\nb==2\n", "# why\nb==2\na==1\n", "a==1\nb==3\n"):
        set_requirements(text, tmp_path, monkeypatch)
        found.append(environment.pinned())
    assert found[0] == found[1] != found[2]


def test_an_empty_cache_has_no_environment(cache: Path) -> None:
    assert environment.find() is None
    fake_environment(cache, None)  # the process that installed it was killed
    assert environment.find() is None


def test_an_environment_of_different_requirements_is_not_used(cache: Path) -> None:
    fake_environment(cache, "0123456789ab")
    assert environment.find() is None


def test_an_environment_without_its_python_is_not_used(cache: Path) -> None:
    python = environment._python_of(fake_environment(cache, environment.pinned()))
    assert environment.find() == environment.Environment(cache, environment.pinned())
    python.unlink()
    python.symlink_to(cache / "uninstalled")
    assert environment.find() is None


def test_the_variable_names_an_environment(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(fake_environment(tmp_path / "image", environment.pinned())))
    found = environment.find()
    assert found is not None and found.folder == tmp_path / "image"
    assert environment.fingerprint() == environment.pinned(), "the same work as in the one of the cache"


def test_the_users_own_environment_has_its_own_fingerprint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(fake_environment(tmp_path / "own", None)))
    assert environment.find() is not None
    assert environment.fingerprint() != environment.pinned()


def test_a_variable_without_an_environment_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ToolchainError, match=r"KOLOTUNE_TORCHTUNE=.*nowhere") as raised:
        environment.find()
    assert "python -m kolotune.engines.torchtune.environment" in raised.value.hint
    environment.fingerprint()  # reading the fingerprint must not raise


def test_packages_that_cannot_be_installed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_requirements("kolotune-has-no-such-package==1.2.3\n", tmp_path, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    notes: list[str] = []
    with pytest.raises(OfflineError, match="kolotune-has-no-such-package") as raised:
        environment.ensure(notes.append)
    assert len(notes) == 1 and "once" in notes[0]
    target = cache.with_name(environment.pinned())
    assert not target.exists(), "no partial environment is left"
    assert target.with_name(f"{target.name}.log").is_file() and ".log" in raised.value.hint


def test_an_environment_that_does_not_work_is_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_requirements("# no package at all: torchtune can't be imported then\n", tmp_path, monkeypatch)
    with pytest.raises(ToolchainError, match=r"can't be imported.*No module named"):
        environment.ensure(lambda text: None)
    assert environment.find() is None and not cache.with_name(environment.pinned()).exists()


def test_an_incomplete_environment_is_replaced(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_requirements("# only the standard library\n", tmp_path, monkeypatch)
    monkeypatch.setattr(environment, "_PROOF", "import json")
    target = cache.with_name(environment.pinned())
    fake_environment(target, None)
    (target / "left over").touch()
    installed = environment.ensure(lambda text: None)
    assert installed.folder == target and environment.find() == installed
    assert not (target / "left over").exists()
    notes: list[str] = []
    assert environment.ensure(notes.append) == installed and not notes, "installed once"


def test_processes_at_the_same_time_install_one_environment(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_requirements("# only the standard library\n", tmp_path, monkeypatch)
    monkeypatch.setattr(environment, "_PROOF", "import json")
    notes: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        installed = list(pool.map(lambda _: environment.ensure(notes.append), range(4)))
    assert len(notes) == 1 and len({each.folder for each in installed}) == 1


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    assert environment.main([str(tmp_path)]) == ToolchainError.exit_code
    assert (tmp_path / "thesis.txt").exists() and str(tmp_path) in capsys.readouterr().err


def test_the_command_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_environment(tmp_path / "there", environment.pinned())
    (tmp_path / "there" / "pyvenv.cfg").touch()
    assert environment.main([str(tmp_path / "there")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "there")
