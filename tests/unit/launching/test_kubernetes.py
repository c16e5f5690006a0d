"""The manifests, against Kubernetes' own schemas, and what is asked of kubectl."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.kubernetes_api import Cluster, kubernetes_api, why_not

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError, LaunchError, RunFolderError
from kolotune.launching import kubernetes
from kolotune.launching.kubernetes import Kubernetes
from kolotune.launching.launcher import LATER, Launched, Order, Plan, Quiet

DOCKERFILE = Path(kubernetes.__file__).parents[1] / "runners" / "container" / "image" / "Dockerfile"
VERSIONS = ["1.27", "1.30", "1.33"]
CLUSTER = {"image": "registry.example/kolotune:1", "claim": "runs"}


def order(folder: Path, machines: int = 1, **more: Any) -> Order:
    (folder / "chats.jsonl").write_text("{}\n")
    options = {"train_data": "chats.jsonl", "nnodes": machines, "rdzv": LATER, "output_dir": folder / "out"}
    return Order(configs.resolve((options, "test", folder)), "job-1", 2.5, **more)


def files(plan: Plan) -> dict[str, list[Any]]:
    return {name: list(yaml.safe_load_all(text)) for name, text in plan.files}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("machines", [1, 3])
def test_manifests_are_what_kubernetes_takes(version: str, machines: int, tmp_path: Path) -> None:
    plan = Kubernetes(**CLUSTER, token_secret="hub/token").plan(
        order(tmp_path, machines, gpus=4, cpus=8, memory_gb=1.5, token_file="/runs/token")
    )
    found = files(plan)
    kinds = [each["kind"] for each in [*found["job-1.yaml"], *found["job-1-files.yaml"]]]
    assert kinds == (["Service"] if machines > 1 else []) + ["Job", "Pod"]
    for each in [*found["job-1.yaml"], *found["job-1-files.yaml"]]:
        assert kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_refuse_what_is_wrong(tmp_path: Path) -> None:
    job = files(Kubernetes(**CLUSTER).plan(order(tmp_path)))["job-1.yaml"][0]
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_pods_meet_at_the_first_and_each_knows_its_number(tmp_path: Path) -> None:
    service, job = files(Kubernetes(**CLUSTER).plan(order(tmp_path, 3)))["job-1.yaml"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "job-1"}
    assert pod["subdomain"] == service["metadata"]["name"], "or pods have no names"
    arguments = pod["containers"][0]["args"]
    assert "--rdzv=job-1-0.job-1:29500" in arguments and "--number=$(KOLOTUNE_MACHINE)" in arguments
    paths = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in pod["containers"][0]["env"]}
    assert paths["KOLOTUNE_MACHINE"].endswith("job-completion-index']")
    assert spec["activeDeadlineSeconds"] == 9000


def test_the_script_is_the_images_own_and_reads_no_words() -> None:
    assert kubernetes.LINK_TOOLCHAIN.removesuffix(" exec") in DOCKERFILE.read_text(encoding="utf-8")


def test_a_token_is_named_and_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    plan = Kubernetes(**CLUSTER, token_secret="hub/token").plan(order(tmp_path))
    assert "hf_Planted" not in str(plan)
    env = files(plan)["job-1.yaml"][0]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}} in env
    with pytest.raises(ConfigError) as told:
        Kubernetes(**CLUSTER, token_secret="hf_TheTokenItself").plan(order(tmp_path))
    assert "hf_TheTokenItself" not in str(told.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": "-x"},
        {"image": "a b"},
        {"claim": "A"},
        {"claim": "$(x)"},
        {"namespace": "a/b"},
        {"gpu_kind": "other"},
    ],
)
def test_names_that_kubernetes_does_not_take(wrong: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Kubernetes(**{**CLUSTER, **wrong}).plan(order(tmp_path))


def test_chats_go_by_a_pod_of_their_own_before_the_job(tmp_path: Path) -> None:
    plan = Kubernetes(**CLUSTER, context="it's mine", namespace="ml").plan(order(tmp_path))
    commands = [shlex.split(each.partition(" < ")[0]) for each in plan.steps if each.startswith("kubectl")]
    assert all(each[1:3] == ["--context=it's mine", "--namespace=ml"] for each in commands)
    verbs = [each[3] for each in commands]
    assert verbs[:4] == ["get", "delete", "create", "wait"] and verbs[-2:] == ["delete", "create"]
    assert set(verbs[4:-2]) == {"exec"}
    config = next(files(plan)[name][0] for name in files(plan) if name.endswith("kolotune.yaml"))
    assert config["train_data"][0].startswith("/runs/.inputs/") and config["output_dir"] == "/runs/job-1"


def test_without_kubectl_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no kubectl"):
        Kubernetes(**CLUSTER).submit(order(tmp_path), Quiet())


def test_what_is_worth_another_try() -> None:
    codes = kubernetes.hopeless_codes()
    assert 2 in codes and 3 in codes and 28 in codes
    assert not {9, 7, 130, 137} & set(codes)


class Notebook(Quiet):
    """Keeps what was said, and can do something at it."""

    def __init__(self, at: Callable[[str], None] = lambda text: None) -> None:
        self.lines: list[str] = []
        self._at = at

    def _line(self, text: str) -> None:
        self.lines.append(text.strip())
        self._at(text)

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        self._line(f"{exit_code} {cause}")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(kubernetes, "_LOOK_SECONDS", 0.05)
    with kubernetes_api(tmp_path) as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig))
        monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps there what it has learnt
        yield running


def printed(*events: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(each)}\n" for each in events).encode()


def failed(code: int) -> bytes:
    event = {"event": "failure", "cause": "/runs/job-1/x: bad", "hint": "", "exit_code": code}
    return printed(event, {"event": "ended", "code": code})


LAUNCHED = Launched("kubernetes", CLUSTER, "job-1", 2, "/runs/job-1", (("/runs/job-1", "/here"),))
DONE = printed({"event": "success", "text": "made /runs/job-1/adapter"}, {"event": "ended", "code": 0})
needs_kubectl = pytest.mark.skipif(bool(why_not()), reason=why_not())


@needs_kubectl
def test_a_job_is_listened_to_until_its_end(cluster: Cluster) -> None:
    """It waits for its image; its log comes in two parts, and no part is told twice."""
    why = {"name": "run", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}

    def go_on(text: str) -> None:
        if "no such image" in text:
            cluster.logs["job-1-0-a"] = DONE[: DONE.index(b"\n") + 1]
            cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Running"})
        if "made" in text:
            cluster.logs["job-1-0-a"] = DONE

    cluster.job("job-1")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Pending", "containerStatuses": [why]})
    cluster.pod("job-1", "job-1-1-a", 1, {"phase": "Running"})
    said = Notebook(go_on)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, said) == 0
    assert said.lines == ["job job-1: ImagePullBackOff no such image", "ok  made /here/adapter"]


@needs_kubectl
def test_a_pod_that_comes_back_is_listened_to_again(cluster: Cluster) -> None:
    def come_back(text: str) -> None:
        if text.startswith("9 "):
            cluster.logs["job-1-0-b"] = DONE
            cluster.pod("job-1", "job-1-0-b", 0, {"phase": "Running"}, created="2026-01-01T00:01:00Z")

    cluster.job("job-1")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Failed"})
    cluster.logs["job-1-0-a"] = failed(9)
    said = Notebook(come_back)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, said) == 0
    assert said.lines == ["9 /here/x: bad", "ok  made /here/adapter"]


@needs_kubectl
def test_a_job_that_failed_ends_as_the_run_did(cluster: Cluster) -> None:
    cluster.job("job-1", "Failed")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Failed"})
    cluster.logs["job-1-0-a"] = failed(3)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook()) == 3


@needs_kubectl
def test_another_machines_failure_is_told_with_its_cause(cluster: Cluster) -> None:
    cluster.job("job-1", "Failed")
    for index, code in ((0, 130), (1, 3)):
        cluster.pod("job-1", f"job-1-{index}-a", index, {"phase": "Failed"})
        cluster.logs[f"job-1-{index}-a"] = failed(code)
    with pytest.raises(LaunchError, match="machine 1: /here/x: bad"):
        Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook())


@needs_kubectl
@pytest.mark.parametrize(("condition", "words"), [("Failed", "is over.*Why: it took too long"), ("", "is gone")])
def test_a_job_that_ended_without_a_word(cluster: Cluster, condition: str, words: str) -> None:
    if condition:
        cluster.job("job-1", condition, "it took too long")
    with pytest.raises(LaunchError, match=words):
        Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook())


@needs_kubectl
def test_one_job_at_a_time_and_it_can_be_stopped(cluster: Cluster, tmp_path: Path) -> None:
    cluster.job("job-1")
    with pytest.raises(RunFolderError, match="is at work"):
        Kubernetes(**CLUSTER).submit(order(tmp_path), Quiet())
    assert not cluster.deleted
    Kubernetes(**CLUSTER).cancel(LAUNCHED, Quiet())
    assert cluster.deleted == ["jobs/job-1"]


@needs_kubectl
def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with kubernetes_api(tmp_path) as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig))
    with pytest.raises(LaunchError, match=r"kubectl delete: .*refused"):
        Kubernetes(**CLUSTER).cancel(LAUNCHED, Quiet())
