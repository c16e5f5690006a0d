"""The part of Kubernetes' API that kubectl needs to read a job, read the logs of its pods, and delete it.

It follows the documented protocol, but runs nothing: it does not show what a cluster does with a manifest.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

_RESOURCES = {"v1": (("pods", "Pod"), ("services", "Service")), "batch/v1": (("jobs", "Job"),)}


def skip_reason() -> str:
    """Return why kubectl can't be used here; "" when it can."""
    return "" if shutil.which("kubectl") else "kubectl is not installed"


class Cluster:
    """The state of the cluster: `objects` by kind and name, `logs` by the pod's name, and `deleted` objects."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.objects: dict[str, dict[str, dict[str, Any]]] = {"jobs": {}, "pods": {}, "services": {}}
        self.logs: dict[str, bytes] = {}
        self.deleted: list[str] = []

    def job(self, name: str, condition: str = "", message: str = "") -> None:
        """Set a job's state: active, or ended with a condition."""
        conditions = [{"type": condition, "status": "True", "reason": "Why", "message": message}] if condition else []
        self._set("jobs", "batch/v1", "Job", name, {}, {"conditions": conditions})

    def pod(
        self, job: str, name: str, index: int, status: dict[str, Any], created: str = "2026-01-01T00:00:00Z"
    ) -> None:
        """Set a pod of a job."""
        meta = {
            "labels": {"job-name": job},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": created,
        }
        self._set("pods", "v1", "Pod", name, meta, status)

    def _set(self, kind: str, version: str, name_of_kind: str, name: str, meta: dict[str, Any], status: Any) -> None:
        whole = {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1", **meta}
        spec = {"containers": [{"name": "run"}]} if kind == "pods" else {}
        self.objects[kind][name] = {
            "apiVersion": version, "kind": name_of_kind, "metadata": whole, "spec": spec, "status": status,
        }  # fmt: skip


@contextlib.contextmanager
def kubernetes_api(folder: Path) -> Iterator[Cluster]:
    """Run a server on the loopback with a kubeconfig."""
    cluster = Cluster(folder / "kubeconfig")

    class Handler(_Handler):
        state = cluster

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    named = {"cluster": "c", "user": "u"}
    cluster.kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "x",
                "clusters": [{"name": "c", "cluster": {"server": address}}],
                "users": [{"name": "u", "user": {}}], "contexts": [{"name": "x", "context": named}],
            }
        )
    )  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Cluster

    def do_GET(self) -> None:
        url = urlparse(self.path)
        parts = [part for part in url.path.split("/") if part]
        if parts == ["api"]:
            self._answer({"kind": "APIVersions", "versions": ["v1"]})
        elif parts == ["apis"]:
            version = {"groupVersion": "batch/v1", "version": "v1"}
            group = {"name": "batch", "versions": [version], "preferredVersion": version}
            self._answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]})
        elif (version := "/".join(parts[1:])) in _RESOURCES:
            verbs = ["create", "delete", "get", "list", "watch"]
            resources = [
                {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
                for name, kind in _RESOURCES[version]
            ]
            self._answer({"kind": "APIResourceList", "groupVersion": version, "resources": resources})
        elif parts[-1] == "log":
            self._bytes(self.state.logs.get(parts[-2], b""), "text/plain")
        else:
            self._objects(parts, parse_qs(url.query))

    def do_DELETE(self) -> None:
        *_, kind, name = urlparse(self.path).path.split("/")
        if self.state.objects.get(kind, {}).pop(name, None) is None:
            return self._missing(kind, name)
        self.state.deleted.append(f"{kind}/{name}")
        return self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _objects(self, parts: list[str], query: dict[str, list[str]]) -> None:
        at = parts.index("default") + 1 if "default" in parts else len(parts)
        kind, *name = parts[at:] or [""]
        known = self.state.objects.get(kind, {})
        if name:
            if name[0] not in known:
                return self._missing(kind, name[0])
            return self._answer(known[name[0]])
        label, _, value = query.get("labelSelector", ["="])[0].partition("=")
        selected = query.get("fieldSelector", [""])[0].removeprefix("metadata.name=")
        items = [
            item
            for item in known.values()
            if (not label or item["metadata"].get("labels", {}).get(label) == value)
            and (not selected or item["metadata"]["name"] == selected)
        ]
        return self._answer({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})

    def _missing(self, kind: str, name: str) -> None:
        status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": f'{kind} "{name}" not found', "details": {"name": name, "kind": kind},
        }  # fmt: skip
        self._answer(status, 404)

    def _answer(self, value: Any, code: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), "application/json", code)

    def _bytes(self, body: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""
