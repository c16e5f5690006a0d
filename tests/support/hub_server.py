"""A server with the hub's protocol for commits, as `huggingface_hub` uses it; files are kept in memory.

Repositories are created (/api/repos/create) and described; /preupload says which files use LFS; the LFS batch returns
addresses for one PUT, or for several parts with ETags and a completion; uploads are verified by hash; a commit of JSON
lines contains small files and names the large ones. Xet, the hub's newer storage, is not supported: a client without
it, or with HF_HUB_DISABLE_XET, does not use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t0ken" * 6
_LFS_TYPE = "application/vnd.git-lfs+json"


class Repository:
    """One repository: its files, and whether it is private."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.by_lfs: set[str] = set()
        self.commits: list[str] = []


class Hub:
    """State of the server, and its faults.

    Attributes:
        refuse: status of the answer, by a fragment of the path.
        silent: fragments of paths; such requests are never answered.
        part_bytes: size of the parts that larger LFS files are uploaded in.
        seen: (method, path, whether it had the token) of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.verified: set[str] = set()
        self.refuse: dict[str, int] = {}
        self.silent: set[str] = set()
        self.over = threading.Event()
        self.part_bytes = 1 << 30
        self.seen: list[tuple[str, str, bool]] = []
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.seen.append((self.command, path, "Authorization" in self.headers))
        if any(fragment in path for fragment in self.hub.silent):
            self.close_connection = True
            self.hub.over.wait()
            return None
        for fragment, status in self.hub.refuse.items():
            if fragment in path:
                return self._answer(status, {"error": "no, and your token is " + TOKEN})
        if self.command == "PUT":
            return self._store(path, body)
        # The address of a completion is signed like those of the storage, and used without the token.
        if not has_token and path != "/api/validate-yaml" and not path.startswith("/complete/"):
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if "/info/lfs/" in path or path.startswith("/complete/") or path == "/verify":
            return self._lfs(path, json.loads(body))
        return self._models(path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            headers["X-Error-Code"] = "RepoNotFound"
        for name, header in headers.items():
            self.send_header(name, header)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _validate(self, request: dict[str, Any]) -> None:
        import yaml

        front = request["content"].split("---\n")
        try:
            wrong = not isinstance(yaml.safe_load(front[1]), dict)
        except (IndexError, yaml.YAMLError):
            wrong = True
        self._answer(400 if wrong else 200, {"errors": [{"message": "bad"}] if wrong else [], "warnings": []})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        address = {"url": f"{self.hub.address}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **address})
        self.hub.repositories[name] = Repository(request.get("visibility") == "private")
        return self._answer(200, address)

    def _models(self, path: str, body: bytes) -> None:
        _, _, _, owner, name, *rest = path.split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self._answer(404, {"error": "Repository not found"})
        if not rest or rest[0] == "revision":
            described = {"id": f"{owner}/{name}", "private": repository.private, "sha": "0" * 40, "siblings": []}
            return self._answer(200, described)
        if rest == ["preupload", "main"]:
            files = json.loads(body)["files"]
            return self._answer(200, {"files": [_mode(each) for each in files]})
        assert rest == ["commit", "main"], path
        assert self.headers["Content-Type"] == "application/x-ndjson"
        return self._commit(f"{owner}/{name}", repository, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        header, *operations = lines
        assert header["key"] == "header" and header["value"]["summary"]
        new: dict[str, bytes] = {}
        large = set()
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                new[value["path"]] = base64.b64decode(value["content"], validate=True)
            else:
                assert operation["key"] == "lfsFile" and value["algo"] == "sha256"
                if value["oid"] not in self.hub.verified:
                    return self._answer(400, {"error": "LFS pointer to a file that was not uploaded"})
                assert len(self.hub.objects[value["oid"]]) == value["size"]
                new[value["path"]] = self.hub.objects[value["oid"]]
                large.add(value["path"])
        repository.files |= new
        repository.by_lfs |= large
        repository.commits.append(header["value"]["summary"])
        oid = f"{len(repository.commits):040x}"
        address = f"{self.hub.address}/{name}/commit/{oid}"
        return self._answer(200, {"success": True, "commitOid": oid, "commitUrl": address})

    def _lfs(self, path: str, request: dict[str, Any]) -> None:
        if path == "/verify":
            good = len(self.hub.objects.get(request["oid"], b"")) == request["size"]
            self.hub.verified |= {request["oid"]} if good else set()
            return self._answer(200 if good else 422, {})
        if path.startswith("/complete/"):
            parts = self.hub.parts[request["oid"]]
            tags = [(each["partNumber"], each["etag"]) for each in request["parts"]]
            assert tags == [(number, _tag(parts[number])) for number in sorted(parts)]
            return self._keep(request["oid"], b"".join(parts[number] for number in sorted(parts)))
        assert self.headers["Accept"] == self.headers["Content-Type"] == _LFS_TYPE or "json" in self.headers["Accept"]
        assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
        return self._answer(200, {"transfer": "basic", "objects": [self._action(each) for each in request["objects"]]})

    def _action(self, lfs_object: dict[str, Any]) -> dict[str, Any]:
        oid, size = lfs_object["oid"], lfs_object["size"]
        if oid in self.hub.verified:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.hub.address}/verify"}
        if size <= self.hub.part_bytes:
            upload: dict[str, Any] = {"href": f"{self.hub.address}/storage/{oid}"}
        else:
            count = -(-size // self.hub.part_bytes)
            addresses = {str(number): f"{self.hub.address}/storage/{oid}/{number}" for number in range(1, count + 1)}
            header = {"chunk_size": str(self.hub.part_bytes), **addresses}
            upload = {"href": f"{self.hub.address}/complete/{oid}", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _store(self, path: str, body: bytes) -> None:
        _, _, oid, *part = path.split("/")
        if not part:
            return self._keep(oid, body)
        self.hub.parts.setdefault(oid, {})[int(part[0])] = body
        return self._answer(200, None, ETag=_tag(body))

    def _keep(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "checksum mismatch"})
        self.hub.objects[oid] = body
        return self._answer(200, {})


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    """Choose as the hub does: by the attributes of a new repository, and by size."""
    assert len(base64.b64decode(file["sample"], validate=True)) <= 512
    large = file["path"].endswith((".safetensors", ".gguf")) or file["size"] > 10 << 20
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}


def _tag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port of this machine while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
