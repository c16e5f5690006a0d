"""The manifests, against Kubernetes' own schemas, and what is asked of kubectl."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kolotune import config as configs
from kolotune.errors import ConfigError, LaunchError
from kolotune.launching import kubernetes
from kolotune.launching.contract import LATER, Order, Plan
from kolotune.launching.kubernetes import Kubernetes

DOCKERFILE = Path(kubernetes.__file__).parents[1] / "image" / "Dockerfile"
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
    from kolotune.launching.contract import Quiet

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no kubectl"):
        Kubernetes(**CLUSTER).submit(order(tmp_path), Quiet())


def test_what_is_worth_another_try() -> None:
    codes = kubernetes.hopeless_codes()
    assert 2 in codes and 3 in codes and 28 in codes
    assert not {9, 7, 130, 137} & set(codes)
