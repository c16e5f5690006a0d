"""Downloads from a hub that stalls, trickles, drops the connection or sends other data: each ends with an error."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import bad_server
from support.hub_downloads import answers, ask, start
from support.mounts import tmpfs

SHA = "a" * 40
WEIGHTS = struct.pack("<Q", 2) + b"{}" + bytes(11 << 20)  # more than the hub's client reads before it writes
FILES = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": struct.pack("<Q", 80)
    + json.dumps({"a": {"dtype": "U8", "shape": [len(WEIGHTS)], "data_offsets": [0, len(WEIGHTS)]}}).encode().ljust(80)
    + WEIGHTS,
}
IMPATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


class Hub(bad_server.Handler):
    """Misbehaves when it sends the weights, or already the model's description, as the repository's name says."""

    seen: list[tuple[str, str]] = []  # noqa: RUF012 - filled by all handlers
    repaired: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        type(self).seen.append((self.command, path))
        if match := re.fullmatch(r"/api/models/t/([^/]+)(/revision/[^/]+)?", path):
            named = [{"rfilename": each} for each in FILES]
            described = {"id": f"t/{match[1]}", "modelId": f"t/{match[1]}", "sha": SHA, "siblings": named}
            return self.describe(match[1], json.dumps(described).encode())
        if re.fullmatch(r"/api/models/t/[^/]+/tree/[^/]+", path):
            listed = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in FILES.items()]
            body = json.dumps(listed).encode()
            self.begin(200, len(body), Content_Type="application/json")
            self.wfile.write(body)
            return None
        _, _, kind, _, _, name = path.split("/")
        return self.file("good" if name != "model.safetensors" or kind in self.repaired else kind, name)

    do_HEAD = do_GET

    def describe(self, kind: str, body: bytes) -> None:
        if kind == "no-answer":
            return self.hold()
        self.begin(200, len(body), Content_Type="application/json")
        if kind == "trickled-answer":
            return self.trickle(body)
        self.wfile.write(body)
        return None

    def file(self, kind: str, name: str) -> None:
        body, headers = FILES[name], {"X_Repo_Commit": SHA, "ETag": f'"{hashlib.sha256(FILES[name]).hexdigest()}"'}
        if self.command == "HEAD":
            return self.hold() if kind == "no-headers" else self.begin(200, len(body), **headers)
        if kind == "changed":
            body = body[:-1] + b"\x01"
        if kind == "short":
            body = body[:-1]
        resumed = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if kind == "resumes" and resumed:
            headers["Content_Range"] = f"bytes {resumed[1]}-{len(body) - 1}/{len(body)}"
            self.begin(206, len(body) - int(resumed[1]), **headers)
            self.wfile.write(body[int(resumed[1]) :])
            return None
        self.begin(200, len(body), **headers)
        if kind == "no-body":
            return self.hold()
        if kind == "trickled-body":
            return self.trickle(body)
        if kind == "dropped":
            return self.drop(body[:1000])
        if kind in ("resumes", "restarts"):
            return self.drop(body[: (10 << 20) + 1000])
        self.wfile.write(body)
        return None


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with bad_server.serving(Hub) as address:
        yield address


CASES = {
    "no-answer": "the hub stopped answering",
    "trickled-answer": "the hub stopped answering",
    "no-body": "the hub stopped answering",
    "trickled-body": "the hub stopped answering",
    "dropped": "the connection to the hub was lost",
    "restarts": "in the same file every time",
    "short": "another size",
    "changed": "model.safetensors",
}


@pytest.fixture(scope="module")
def outcomes(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str, Path]]:
    """Answer, output and cache for each case; they run at once, because most of it is waiting."""
    caches = {kind: tmp_path_factory.mktemp(kind) for kind in CASES}
    started = {kind: start(hub, cache, f"t/{kind}", **IMPATIENT) for kind, cache in caches.items()}
    results = {}
    for kind, child in started.items():
        answer, output = answers(child)
        results[kind] = (answer[f"t/{kind}"], output, caches[kind])
    return results


@pytest.mark.parametrize("kind", CASES)
def test_a_bad_download_ends_with_an_error(kind: str, outcomes: Any) -> None:
    answer, output, cache = outcomes[kind]
    require_error(answer, kind, CASES[kind])
    assert "Traceback" not in output
    weights = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert weights == []


@pytest.mark.slow  # the hub's client waits longer and longer before it tries again
def test_a_hub_without_headers(hub: str, tmp_path: Path) -> None:
    answer, output = ask(hub, tmp_path, "t/no-headers", **IMPATIENT)
    require_error(answer["t/no-headers"], "no-headers", "the hub stopped answering")
    assert "Traceback" not in output


def require_error(answer: dict[str, Any], kind: str, words: str) -> None:
    assert answer.get("kind") == "OfflineError", answer
    assert words in answer["cause"] and answer["cause"].startswith(f"t/{kind}: ")
    assert "complete files are kept" in answer["hint"]
    assert answer["seconds"] < 60
    assert not answer["is_there"]


@pytest.mark.parametrize("kind", ["no-body", "trickled-body", "dropped", "short", "changed", "restarts"])
def test_retries_are_limited_and_complete_files_are_kept(kind: str, outcomes: Any, hub: str) -> None:
    cache = outcomes[kind][2]
    prefix = f"/t/{kind}/resolve/{SHA}/"

    def fetched() -> list[str]:
        return [path.removeprefix(prefix) for method, path in Hub.seen if method == "GET" and path.startswith(prefix)]

    before = fetched()
    assert sorted(set(before)) == sorted(FILES)
    assert before.count("config.json") == before.count("tokenizer.json") == 1
    assert before.count("model.safetensors") <= 7
    Hub.repaired.add(kind)
    answer, _ = ask(hub, cache, f"t/{kind}", **IMPATIENT)
    assert fetched()[len(before) :] == ["model.safetensors"]
    folder = Path(answer[f"t/{kind}"]["folder"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_an_interrupted_file_is_resumed(hub: str, tmp_path: Path) -> None:
    answer, _ = ask(hub, tmp_path, "t/resumes", **IMPATIENT)
    assert (Path(answer["t/resumes"]["folder"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_full_disk_is_not_reported_as_a_network_error(hub: str, mount: Callable[..., Path]) -> None:
    answer, output = ask(hub, tmpfs(mount, "4m"), "t/good", **IMPATIENT)
    assert answer["t/good"]["kind"] == "SpaceError", answer
    assert "the disk is full" in answer["t/good"]["cause"]
    assert not answer["t/good"]["is_there"] and "Traceback" not in output
