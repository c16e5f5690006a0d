"""The manifests, checked against Kubernetes' own schemas, and the calls of kubectl."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.jobs import Notebook, job_spec
from support.kubernetes_api import Cluster, kubernetes_api, skip_reason

from kolotune.foundation.errors import ConfigError, LaunchError, RunFolderError
from kolotune.launching import kubernetes, kubernetes_manifests
from kolotune.launching.job_output import SilentReporter
from kolotune.launching.kubernetes import Kubernetes
from kolotune.launching.launcher import LaunchedJob, LaunchPlan

DOCKERFILE = Path(kubernetes.__file__).parents[1] / "runners" / "container" / "image" / "Dockerfile"
VERSIONS = ["1.27", "1.30", "1.33"]
CLUSTER = {"image": "registry.example/kolotune:1", "claim": "runs"}


def files(plan: LaunchPlan) -> dict[str, list[Any]]:
    return {name: list(yaml.safe_load_all(text)) for name, text in plan.files}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("machines", [1, 3])
def test_manifests_are_valid(version: str, machines: int, tmp_path: Path) -> None:
    plan = Kubernetes(**CLUSTER, token_secret="hub/token").plan(
        job_spec(tmp_path, machines, gpus=4, cpus=8, memory_gb=1.5, token_file="/runs/token")
    )
    manifests = [*files(plan)["job-1.yaml"], *files(plan)["job-1-files.yaml"]]
    kinds = [manifest["kind"] for manifest in manifests]
    assert kinds == (["Service"] if machines > 1 else []) + ["Job", "Pod"]
    for manifest in manifests:
        assert kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_refuse_an_unknown_field(tmp_path: Path) -> None:
    job = files(Kubernetes(**CLUSTER).plan(job_spec(tmp_path)))["job-1.yaml"][0]
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_pods_meet_at_the_first_one_and_know_their_numbers(tmp_path: Path) -> None:
    service, job = files(Kubernetes(**CLUSTER).plan(job_spec(tmp_path, 3)))["job-1.yaml"]
    fields, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (fields["completionMode"], fields["completions"], fields["parallelism"]) == ("Indexed", 3, 3)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "job-1"}
    assert pod["subdomain"] == service["metadata"]["name"], "otherwise pods have no names"
    arguments = pod["containers"][0]["args"]
    assert "--rdzv=job-1-0.job-1:29500" in arguments and "--number=$(KOLOTUNE_MACHINE)" in arguments
    paths = {entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in pod["containers"][0]["env"]}
    assert paths["KOLOTUNE_MACHINE"].endswith("job-completion-index']")
    assert fields["activeDeadlineSeconds"] == 5400


def test_the_script_is_that_of_the_image() -> None:
    assert kubernetes_manifests.LINK_TOOLCHAIN.removesuffix(" exec") in DOCKERFILE.read_text(encoding="utf-8")


def test_a_manifest_never_contains_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    plan = Kubernetes(**CLUSTER, token_secret="hub/token").plan(job_spec(tmp_path))
    assert "hf_Planted" not in str(plan)
    env = files(plan)["job-1.yaml"][0]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}} in env
    with pytest.raises(ConfigError) as raised:
        Kubernetes(**CLUSTER, token_secret="hf_TheTokenItself").plan(job_spec(tmp_path))
    assert "hf_TheTokenItself" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [{"image": "-x"}, {"image": "a b"}, {"claim": "A"}, {"claim": "$(x)"}, {"namespace": "a/b"}, {"gpu_kind": "other"}],
)
def test_invalid_names(wrong: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Kubernetes(**{**CLUSTER, **wrong}).plan(job_spec(tmp_path))


def test_files_are_sent_through_a_pod_before_the_job_starts(tmp_path: Path) -> None:
    spec = job_spec(tmp_path)
    (own := tmp_path / "own.jinja").write_text("{{ messages }}")
    spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, chat_template=own))
    plan = Kubernetes(**CLUSTER, context="it's mine", namespace="ml").plan(spec)
    commands = [shlex.split(step.partition(" < ")[0]) for step in plan.steps if step.startswith("kubectl")]
    assert all(command[1:3] == ["--context=it's mine", "--namespace=ml"] for command in commands)
    verbs = [command[3] for command in commands]
    assert verbs[:4] == ["get", "delete", "create", "wait"] and verbs[-2:] == ["delete", "create"]
    assert set(verbs[4:-2]) == {"exec"}
    config = next(files(plan)[name][0] for name in files(plan) if name.endswith("kolotune.yaml"))
    assert config["chat_template"].startswith("/runs/.inputs/") and config["chat_template"].endswith("/own.jinja")
    assert config["train_data"][0].startswith("/runs/.inputs/") and config["output_dir"] == "/runs/job-1"


def test_kubectl_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no kubectl"):
        Kubernetes(**CLUSTER).submit(job_spec(tmp_path), SilentReporter())


def test_exit_codes_that_are_not_retried() -> None:
    codes = kubernetes_manifests.final_codes()
    assert 2 in codes and 3 in codes and 28 in codes
    assert not {9, 7, 130, 137} & set(codes)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(kubernetes, "_LOOK_SECONDS", 0.05)
    with kubernetes_api(tmp_path) as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig))
        monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps its cache there
        yield running


def printed(*events: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(event)}\n" for event in events).encode()


def failed(code: int) -> bytes:
    event = {"event": "failure", "cause": "/runs/job-1/x: bad", "hint": "", "exit_code": code}
    return printed(event, {"event": "ended", "code": code})


LAUNCHED = LaunchedJob("kubernetes", CLUSTER, "job-1", 2, "/runs/job-1", (("/runs/job-1", "/here"),))
DONE = printed({"event": "success", "text": "made /runs/job-1/adapter"}, {"event": "ended", "code": 0})
needs_kubectl = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())


@needs_kubectl
def test_a_job_is_followed_until_its_end(cluster: Cluster) -> None:
    """It waits for its image; its log arrives in two parts, and neither is shown twice."""
    waiting = {"name": "run", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}

    def proceed(text: str) -> None:
        if "no such image" in text:
            cluster.logs["job-1-0-a"] = DONE[: DONE.index(b"\n") + 1]
            cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Running"})
        if "made" in text:
            cluster.logs["job-1-0-a"] = DONE

    cluster.job("job-1")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Pending", "containerStatuses": [waiting]})
    cluster.pod("job-1", "job-1-1-a", 1, {"phase": "Running"})
    notebook = Notebook(proceed)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, notebook) == 0
    assert notebook.lines == ["job job-1: ImagePullBackOff no such image", "ok  made /here/adapter"]


@needs_kubectl
def test_a_restarted_pod_is_followed(cluster: Cluster) -> None:
    def restart(text: str) -> None:
        if text.startswith("9 "):
            cluster.logs["job-1-0-b"] = DONE
            cluster.pod("job-1", "job-1-0-b", 0, {"phase": "Running"}, created="2026-01-01T00:01:00Z")

    cluster.job("job-1")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Failed"})
    cluster.logs["job-1-0-a"] = failed(9)
    notebook = Notebook(restart)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, notebook) == 0
    assert notebook.lines == ["9 /here/x: bad", "ok  made /here/adapter"]


@needs_kubectl
def test_a_failed_job_has_the_exit_code_of_its_run(cluster: Cluster) -> None:
    cluster.job("job-1", "Failed")
    cluster.pod("job-1", "job-1-0-a", 0, {"phase": "Failed"})
    cluster.logs["job-1-0-a"] = failed(3)
    assert Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook()) == 3


@needs_kubectl
def test_a_failure_of_another_machine_is_raised_with_its_cause(cluster: Cluster) -> None:
    cluster.job("job-1", "Failed")
    for index, code in ((0, 130), (1, 3)):
        cluster.pod("job-1", f"job-1-{index}-a", index, {"phase": "Failed"})
        cluster.logs[f"job-1-{index}-a"] = failed(code)
    with pytest.raises(LaunchError, match="machine 1: /here/x: bad"):
        Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook())


@needs_kubectl
@pytest.mark.parametrize(("condition", "message"), [("Failed", "Why: it took too long"), ("", "no longer exists")])
def test_a_job_that_ended_without_output(cluster: Cluster, condition: str, message: str) -> None:
    if condition:
        cluster.job("job-1", condition, "it took too long")
    with pytest.raises(LaunchError, match=message):
        Kubernetes(**CLUSTER).follow(LAUNCHED, Notebook())


@needs_kubectl
def test_one_job_at_a_time_and_it_can_be_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    cluster.job("job-1")
    with pytest.raises(RunFolderError, match="job-1"):
        Kubernetes(**CLUSTER).submit(job_spec(tmp_path), SilentReporter())
    assert not cluster.deleted
    Kubernetes(**CLUSTER).cancel(LAUNCHED, SilentReporter())
    assert cluster.deleted == ["jobs/job-1"]


@needs_kubectl
def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with kubernetes_api(tmp_path) as stopped:
        monkeypatch.setenv("KUBECONFIG", str(stopped.kubeconfig))
    with pytest.raises(LaunchError, match=r"kubectl delete: .*refused"):
        Kubernetes(**CLUSTER).cancel(LAUNCHED, SilentReporter())
