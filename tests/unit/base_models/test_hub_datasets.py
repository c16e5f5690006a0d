"""Data sets of the hub: which files are taken, and downloads from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import bad_server

from kolotune.base_models.hub_datasets import DatasetReference, chosen_files, reference_of
from kolotune.foundation.chat_paths import hub_source
from kolotune.foundation.errors import DataError

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/convert/parquet": "c" * 40}
FILES = {
    "README.md": b"about",
    "data/train-00000-of-00002.jsonl": b'{"prompt": "q", "completion": "a"}\n',
    "data/train-00001-of-00002.jsonl": b'{"prompt": "r", "completion": "b"}\n',
    "other/test.jsonl": b'{"prompt": "s", "completion": "c"}\n',
    "other/train.jsonl": b'{"prompt": "s", "completion": "c"}\n',
}
_ASK = """
import json, sys
from pathlib import Path
from kolotune.cli.options import resolve_flags
from kolotune.foundation.errors import KolotuneError
for name in sys.argv[1:]:
    try:
        found = resolve_flags({}, [Path(name)])
        answer = [str(path) for path in found.train_data]
    except KolotuneError as error:
        answer = {"kind": type(error).__name__, "cause": error.cause, "hint": error.hint}
    print("answer", json.dumps([name, answer]))
"""


class Hub(bad_server.Handler):
    """Describes and sends one data set, as the hub does: by commit, with an ETag that is the hash of a file."""

    damaged = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path.startswith("/api/datasets/o/n"):
            revision = path.removeprefix("/api/datasets/o/n").removeprefix("/revision/") or "main"
            if revision in COMMITS.values() or revision in COMMITS:
                siblings = [{"rfilename": name} for name in FILES]
                sha = COMMITS.get(revision, revision)
                return self.answer({"id": "o/n", "sha": sha, "private": False, "siblings": siblings})
            return self.fail("RevisionNotFound")
        if path.startswith("/datasets/o/n/resolve/"):
            commit, _, name = path.removeprefix("/datasets/o/n/resolve/").partition("/")
            return self.send_file(commit, name)
        return self.fail("RepoNotFound")

    do_HEAD = do_GET

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.begin(200, len(body), Content_Type="application/json")
        self.wfile.write(body)

    def fail(self, code: str) -> None:
        self.begin(404, 0, X_Error_Code=code)

    def send_file(self, commit: str, name: str) -> None:
        body = FILES[name]
        digest = hashlib.sha256(body).hexdigest()
        if self.damaged and self.damaged in name:
            body = body.replace(b"q", b"x")
        self.begin(200, len(body), ETag=f'"{digest}"', X_Repo_Commit=commit)
        if self.command == "GET":
            self.wfile.write(body)


class DamagingHub(Hub):
    damaged = "train-00000"


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Any]:
    """Resolve data sets in a separate process, whose hub is on this machine."""

    def call(endpoint: str, *names: str) -> dict[str, Any]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        more = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        env = {**clean, **more, "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-c", _ASK, *names], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        return dict(json.loads(line[7:]) for line in ran.stdout.splitlines() if line.startswith("answer "))

    yield call


def test_files_of_one_revision_are_downloaded(ask: Any) -> None:
    plain, older, one = "hf://datasets/o/n", "hf://datasets/o/n@v1", "hf://datasets/o/n/other/train.jsonl"
    wrong, missing, split = "hf://datasets/o/n@v9", "hf://datasets/o/none", "hf://datasets/o/n/other"
    with bad_server.serving(Hub) as endpoint:
        found = ask(endpoint, plain, older, one, wrong, missing, split)
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert [hub_source(Path(path)) for path in found[plain]] == [f"{plain}@{'a' * 40}/{name}" for name in names]
    assert [Path(path).read_bytes() for path in found[plain]] == [FILES[name] for name in names]
    assert hub_source(Path(found[older][0])) == f"{plain}@{'b' * 40}/{names[0]}"
    assert [Path(path).name for path in found[one]] == ["train.jsonl"]
    assert found[wrong]["kind"] == "ModelNotFoundError" and "no such revision" in found[wrong]["cause"]
    assert found[missing]["kind"] == "ModelNotFoundError" and "data set" in found[missing]["cause"]
    assert found[split]["kind"] == "DataError" and "o/n/other/train.jsonl" in found[split]["hint"]


def test_a_file_with_other_bytes_is_refused(ask: Any) -> None:
    with bad_server.serving(DamagingHub) as endpoint:
        found = ask(endpoint, "hf://datasets/o/n")["hf://datasets/o/n"]
    assert found["kind"] == "OfflineError" and "train-00000-of-00002.jsonl" in found["cause"]


@pytest.mark.parametrize(
    ("written", "name", "revision", "path"),
    [
        ("hf://datasets/o/n", "o/n", None, ""),
        ("hf://datasets/o/n-1.x@v1", "o/n-1.x", "v1", ""),
        ("hf://datasets/o/n@refs/convert/parquet/default/train", "o/n", "refs/convert/parquet", "default/train"),
        ("hf://datasets/o/n/data/*.parquet", "o/n", None, "data/*.parquet"),
    ],
)
def test_names(written: str, name: str, revision: str | None, path: str, tmp_path: Path) -> None:
    for given in (Path(written), tmp_path / written):
        assert reference_of(given) == DatasetReference(name, revision, path)
    assert str(reference_of(Path(written))) == written


@pytest.mark.parametrize("path", ["chats.jsonl", "datasets/o/n", "hf/datasets/o/n.jsonl", "hf://spaces/o/n"])
def test_other_paths_are_files(path: str) -> None:
    assert reference_of(Path(path)) is None and hub_source(Path(path)) is None


@pytest.mark.parametrize(
    ("files", "path", "chosen"),
    [
        (["chats.jsonl", "README.md", "data/x.jsonl"], "", ["chats.jsonl"]),
        (["data/b.parquet", "data/a.parquet", ".gitattributes"], "", ["data/a.parquet", "data/b.parquet"]),
        (["en/a.jsonl.gz", "de/a.jsonl"], "en", ["en/a.jsonl.gz"]),
        (["a.jsonl", "b.jsonl"], "b.jsonl", ["b.jsonl"]),
        (["data/train-0.parquet", "data/test-0.parquet"], "data/train-*", ["data/train-0.parquet"]),
        (["data/train-0.parquet", "data/test-0.parquet"], "data/test-0.parquet", ["data/test-0.parquet"]),
        (["dataset_infos.json", "a.json"], "", ["a.json"]),
    ],
)
def test_which_files_are_taken(files: list[str], path: str, chosen: list[str]) -> None:
    assert chosen_files(DatasetReference("o/n", None, path), files) == chosen


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["en/a.jsonl", "de/a.jsonl"], "it has chats in: de, en"),
        (["load.py", "README.md"], "has no files of chats"),
        (
            ["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
            "'hf://datasets/o/n/data/train-*.parquet'",
        ),
    ],
)
def test_what_to_name(files: list[str], hint: str) -> None:
    with pytest.raises(DataError) as error:
        chosen_files(DatasetReference("o/n"), files)
    assert hint in str(error.value.hint)
