"""Base models: each answer of the hub has its own error; folders that can be fine-tuned, and those that can't."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.hub_downloads import ask

from kolotune.base_models import catalog, lookup
from kolotune.base_models import hub as hub_models
from kolotune.foundation import errors
from kolotune.foundation.errors import ConfigError, ModelError
from kolotune.foundation.reporter import PlainReporter
from kolotune.foundation.secrets import Secret
from kolotune.weights.weight_files import weight_files

TOKEN = "hf_PlantedTokenThatMustNotBeSeen"
SHA = "a" * 40
FILES = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": struct.pack("<Q", 2) + b"{}",
}
# The Llamas have their weights a second time, pickled, below original/.
NAMES = [*FILES, "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json"]


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, depending on the repository's name."""

    seen: list[tuple[str, str, str | None]] = []  # noqa: RUF012 - filled by all handlers

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        type(self).seen.append((self.command, self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/(t/[^/]+)(/revision/[^/]+)?", path):
            self.info(match[1])
        elif re.fullmatch(r"/api/models/(t/[^/]+)/tree/[^/]+", path):
            listed = [{"type": "file", "path": each, "size": len(FILES.get(each, b"")), "oid": each} for each in NAMES]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
        elif match := re.fullmatch(r"/(t/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(match[1], match[2])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def info(self, repo: str) -> None:
        name = repo.removeprefix("t/")
        if name == "login":
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        elif name == "badtoken":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif name == "drop":
            self.close_connection = True
        elif name == "gone":
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif name.startswith("code"):
            self.answer(int(name.removeprefix("code")))
        else:
            files = ["config.json", "pytorch_model.bin"] if name == "pickled" else NAMES
            body = {"id": repo, "modelId": repo, "sha": SHA, "siblings": [{"rfilename": each} for each in files]}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def file(self, repo: str, name: str) -> None:
        kind = repo.removeprefix("t/")
        if kind == "gated":
            self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
        elif kind == "gatedlogin":
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
        elif kind.startswith("wait"):
            headers = {"Retry-After": "86400"} if kind == "wait429" else {"RateLimit": '"resolvers";r=0;t=3600'}
            self.answer(429, headers)
        elif kind.startswith("file"):
            self.answer(int(kind.removeprefix("file")))
        else:
            body = FILES[name]
            cut = kind == "cut" and name == "model.safetensors" and self.command == "GET"
            self.answer(200, {"ETag": f'"{name}"', "X-Repo-Commit": SHA}, body, cut=cut)

    def answer(
        self, code: int, headers: dict[str, str] | None = None, body: bytes | None = None, cut: bool = False
    ) -> None:
        body = f"hub text {self.headers.get('Authorization')} \x1b[2J".encode() if body is None else body
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def answers(hub: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    cache = tmp_path_factory.mktemp("hub")
    cases = ["badtoken", "gone", "gated", "gatedlogin", "code403", "pickled", "file403", "file404"]
    return ask(hub, cache, *(f"t/{each}" for each in cases), HF_TOKEN=TOKEN)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("t/badtoken", "AccessError", "refused the token (401)"),
        ("t/gone", "ModelNotFoundError", "no such model"),
        ("t/gated", "AccessError", "is gated"),
        ("t/gatedlogin", "AccessError", "is gated"),
        ("t/code403", "AccessError", "(403)"),
        ("t/pickled", "ModelError", "no safetensors"),
        ("t/file403", "AccessError", "(403)"),
        ("t/file404", "OfflineError", "404"),
    ],
)
def test_each_answer_of_the_hub_has_its_own_error(answers: Any, name: str, kind: str, words: str) -> None:
    answer = answers[0][name]
    assert answer.get("kind") == kind, answer
    assert answer["code"] == getattr(errors, kind).exit_code
    assert answer["cause"].startswith(f"{name}: ")
    assert words in answer["cause"]
    assert answer["hint"]
    assert "\n" not in answer["cause"] + answer["hint"]
    assert answer["seconds"] < 10


def test_messages_contain_neither_the_token_nor_the_hubs_text(answers: Any) -> None:
    assert TOKEN not in answers[1]
    assert "hub text" not in answers[1]
    assert "Traceback" not in answers[1]
    assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in Hub.seen)


def test_without_a_token_a_401_asks_for_a_login(hub: str, tmp_path: Path) -> None:
    answer, _ = ask(hub, tmp_path, "t/login")
    assert answer["t/login"]["code"] == 6
    assert "login (401)" in answer["t/login"]["cause"]
    assert "HF_TOKEN" in answer["t/login"]["hint"]


def test_a_token_from_a_file_is_used_and_not_repeated(hub: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f" {TOKEN}2 \n")
    answer, output = ask(hub, tmp_path, "t/gated", token_file=str(tmp_path / "token"))
    assert any(authorization == f"Bearer {TOKEN}2" for _, _, authorization in Hub.seen)
    assert answer["t/gated"]["code"] == 6
    assert TOKEN not in output


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("t/file429", "t/file500")]  # the client tries again


@pytest.mark.parametrize("name", ["t/code429", "t/code500", "t/code503", *SLOW])
def test_an_error_answer_is_in_the_message(hub: str, tmp_path: Path, name: str) -> None:
    answer, _ = ask(hub, tmp_path, name)
    assert answer[name]["code"] == 7, answer
    assert f"the hub answered {name[-3:]}" in answer[name]["cause"]
    assert "later" in answer[name]["hint"]
    assert answer[name]["seconds"] < 60


def test_a_model_is_downloaded_once_and_later_needs_no_hub(hub: str, tmp_path: Path) -> None:
    first, _ = ask(hub, tmp_path, "t/good")
    folder = Path(first["t/good"]["folder"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)  # and no pickle
    assert not [path for _, path, _ in Hub.seen if "/resolve/" in path and "original" in path]
    again, output = ask("http://127.0.0.1:9", tmp_path, "t/good", "T/Good")
    assert again["t/good"]["folder"] == str(folder)
    assert "downloading" in output  # for the other spelling
    assert again["T/Good"]["code"] == 7


def test_long_waits_are_refused(hub: str, tmp_path: Path) -> None:
    answer, output = ask(hub, tmp_path, "t/wait429", "t/waitlimit")
    for name, hint in (("t/wait429", "24.0 h"), ("t/waitlimit", "60 min")):
        assert answer[name].get("code") == 7, answer
        assert "answered 429 and asks to wait" in answer[name]["cause"]
        assert hint in answer[name]["hint"]
        assert answer[name]["seconds"] < 30
    assert "Traceback" not in output


def test_a_lost_connection_and_an_unknown_host(hub: str, tmp_path: Path) -> None:
    answer, output = ask(hub, tmp_path, "t/drop")
    nowhere, _ = ask("http://hub.invalid", tmp_path, "t/any")
    assert "the connection to the hub was lost" in answer["t/drop"]["cause"]
    assert "can't be reached: the name hub.invalid can't be resolved" in nowhere["t/any"]["cause"]
    for result in (answer["t/drop"], nowhere["t/any"]):
        assert result["code"] == 7 and result["hint"]
        assert result["seconds"] < 60
    assert "Traceback" not in output


@pytest.mark.slow
def test_complete_files_are_kept_when_a_download_is_truncated(hub: str, tmp_path: Path) -> None:
    ask(hub, tmp_path, "t/cut")
    kept = [path for path in tmp_path.rglob("blobs/*") if path.is_file() and not path.name.endswith(".incomplete")]
    assert {path.name for path in kept} >= {"config.json", "tokenizer.json"}
    before = len(Hub.seen)
    ask(hub, tmp_path, "t/cut")
    fetched = [path for method, path, _ in Hub.seen[before:] if method == "GET" and "/resolve/" in path]
    assert fetched and all(path.endswith("model.safetensors") for path in fetched)


@pytest.mark.slow
def test_a_truncated_download_is_an_error(hub: str, tmp_path: Path) -> None:
    answer, output = ask(hub, tmp_path, "t/cut")
    assert answer["t/cut"].get("code") == 7, answer
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


@pytest.mark.parametrize(
    ("env", "words"), [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({}, "the connection is refused")]
)
def test_offline_has_its_own_message(tmp_path: Path, env: dict[str, str], words: str) -> None:
    answer, _ = ask("http://127.0.0.1:9", tmp_path, "t/any", **env)
    assert answer["t/any"]["code"] == 7
    assert f"can't be reached: {words}" in answer["t/any"]["cause"]
    assert answer["t/any"]["seconds"] < 30


@pytest.mark.parametrize(
    "name",
    [
        "; rm -rf ~",
        "$(id)",
        "new\nline",
        "-x",
        "--help",
        "a" * 300,
        "a/" + "b" * 97,
        "modèle",
        "owner/modèle",
        "owner/日本",
        "a/b/c",
        "a/b--c",
        "a/..",
        "../../no/such",
        "a/b.git",
        "a/b-",
        "",
        "a\0b",
        "owner/na\udcffme",
        "owner/name\n",
        "http://evil/x",
    ],
)
def test_names_that_are_neither_folders_nor_hub_ids_are_refused_at_once(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub_models, "download_model", lambda *_: pytest.fail("requested from the hub"))
    assert lookup.locate(name) is None
    with pytest.raises(ModelError) as error:
        lookup.resolve(name, None, PlainReporter())
    assert error.value.exit_code in (4, 5)
    assert error.value.hint


def test_known_names_in_any_case() -> None:
    assert catalog.canonical_name("SmolLM2-135M") == "smollm2-135m"
    assert catalog.canonical_name("META-LLAMA/llama-3.2-1b-instruct") == "meta-llama/Llama-3.2-1B-Instruct"
    assert catalog.canonical_name("else") == "else"


@pytest.mark.parametrize("text", ["", "  \n\n", None, b"\xff\xfe"])
def test_a_token_that_cannot_be_read_is_a_config_error(tmp_path: Path, text: Any) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="hf-token"):
        hub_models.read_token(str(path))


def test_a_token_is_read_from_standard_input(monkeypatch: Any) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\nmore\n"))
    assert hub_models.read_token("-") == Secret(TOKEN)
    assert hub_models.read_token(None) is None


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def _json(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    loaded = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**loaded, **changes}))


def _cut(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "config is latin-1": (lambda folder: (folder / "config.json").write_bytes(b'{"\xe9": 1}'), "can't be read"),
    "config is deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "config.json"),
    "no architecture": (lambda folder: _json(folder, architectures=[]), "no architecture"),
    "quantized": (lambda folder: _json(folder, quantization_config={"bits": 4}), "quantized already"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "pickled": (_pickle, "only pickled ones (pytorch_model.bin)"),
    "empty weights": (lambda folder: _cut(folder, 0), "is damaged"),
    "cut in the header": (lambda folder: _cut(folder, 100), "is damaged"),
    "cut in the data": (lambda folder: _cut(folder, 1_000_000), "is damaged"),
    "last byte cut": (lambda folder: _cut(folder, (folder / "model.safetensors").stat().st_size - 1), "is damaged"),
    "huge header": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "is damaged",
    ),
    "missing shard": (
        lambda folder: _index(folder, {"a": "model.safetensors", "b": "model-2.safetensors"}),
        "is missing, though the index names it",
    ),
    "index names what no file can be called": (
        lambda folder: _index(folder, {"a": "[" * 300}),
        "File name too long",
    ),
    "index names a parent": (lambda folder: _index(folder, {"a": "../model.safetensors"}), "outside the folder"),
    "index names a root": (lambda folder: _index(folder, {"a": "/etc/passwd"}), "outside the folder"),
    "index names dots": (lambda folder: _index(folder, {"a": ".."}), "model.safetensors"),
    "index names numbers": (lambda folder: _index(folder, {"a": 5}), "can't be read"),
    "index names lists": (lambda folder: _index(folder, {"a": [1]}), "can't be read"),
    "index is a list": (lambda folder: _index(folder, []), "can't be read"),
    "index is empty": (lambda folder: _index(folder, {}), "no safetensors weights"),
    "index is cut": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map'),
        "can't be read",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused_with_their_cause(folder: Path, name: str) -> None:
    spoil, words = BAD_FOLDERS[name]
    spoil(folder)
    with pytest.raises(ModelError) as error:
        lookup.resolve(str(folder), None, PlainReporter())
    assert error.value.exit_code == 4
    if name != "index names dots":
        assert words in error.value.cause
    assert str(folder) in error.value.cause
    assert "\n" not in error.value.cause
    assert error.value.hint


def test_a_good_folder_with_shards(folder: Path) -> None:
    assert lookup.resolve(str(folder), None, PlainReporter()) == folder == lookup.locate(str(folder))
    shutil.copyfile(folder / "model.safetensors", folder / "second.safetensors")
    _index(folder, {"a": "model.safetensors", "b": "second.safetensors"})
    assert [path.name for path in weight_files(folder)] == ["model.safetensors", "second.safetensors"]


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        lookup.resolve(str(folder / "config.json"), None, PlainReporter())
    assert lookup.locate(str(folder / "config.json")) is None


def test_of_a_gguf_a_folder_is_made_first(folder: Path) -> None:
    (folder / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a GGUF") as refused:
        lookup.resolve(str(folder / "model.gguf"), None, PlainReporter())
    assert f"kolotune dequantize {folder / 'model.gguf'}" in refused.value.hint
