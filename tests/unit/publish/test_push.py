"""`push`: what arrives at a hub that follows the protocol, and the errors when it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from support.hub_server import TOKEN, Hub, Repository, serving

from kolotune.foundation.config import Config
from kolotune.foundation.errors import (
    AccessError,
    ConfigError,
    HubError,
    KolotuneError,
    ManifestError,
    ModelNotFoundError,
    OfflineError,
)
from kolotune.publish import model_card
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import BaseModel, read_manifest

REPOSITORY = "someone/my-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def push(hub: Hub, finished: Config, kolotune: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    def call(what: str, *more: str) -> tuple[int, str]:
        code, output = kolotune("push", finished.output_dir, REPOSITORY, "--what", what, *more)
        assert TOKEN not in output
        return code, output

    return call


def front_of(card: bytes) -> dict[str, object]:
    loaded = yaml.safe_load(card.decode().split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_every_kind_arrives_complete(push: Callable[..., tuple[int, str]], hub: Hub, finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    for what in ("adapter", "merged", "gguf"):
        code, output = push(what)
        assert code == 0 and f"{hub.address}/{REPOSITORY}/commit/" in output, output
    repository = hub.repositories[REPOSITORY]
    assert repository.private and repository.commits == [
        f"{kind}, by kolotune" for kind in ("adapter", "merged", "gguf")
    ]
    for name in ("Merged.gguf", "MergedQ4_K_M.gguf", "Modelfile", "ModelfileQ4_K_M"):
        assert repository.files[name] == (run.root / name).read_bytes()
    assert repository.files["model.safetensors"] == (run.merged_model / "model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert repository.files["tokenizer.json"] == (run.tokenizer / "tokenizer.json").read_bytes()
    large = {"Merged.gguf", "MergedQ4_K_M.gguf", "model.safetensors", "adapter_model.safetensors"}
    assert repository.by_lfs == large
    # No chats, no paths of this machine, no files about how it was made here.
    assert not {"held_out.jsonl", "train.safetensors", "manifest.json", "config.yaml"} & set(repository.files)
    config = json.loads(repository.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "" and config["r"] == 2
    for name, content in repository.files.items():
        if name not in large:
            assert str(finished.output_dir.parent).encode() not in content, name
    # The storage's URLs are signed, so the token must not be sent there.
    assert {token for method, path, token in hub.seen if path.startswith("/storage/")} == {False}


def test_large_files_go_in_parts_and_only_once(
    push: Callable[..., tuple[int, str]], hub: Hub, finished: Config
) -> None:
    hub.part_bytes = 1_000_000
    assert push("gguf")[0] == 0
    parts = [path for method, path, _ in hub.seen if method == "PUT"]
    assert len(parts) > 10 and len(set(parts)) == len(parts)
    stored = hub.repositories[REPOSITORY].files["Merged.gguf"]
    assert stored == RunFolder(finished.output_dir).gguf.read_bytes()
    hub.seen.clear()
    assert push("gguf")[0] == 0
    assert [path for method, path, _ in hub.seen if method == "PUT"] == []


def test_model_card(push: Callable[..., tuple[int, str]], hub: Hub, finished: Config) -> None:
    code, shown = push("gguf", "--dry-run")
    assert code == 0 and hub.seen == []
    assert push("gguf")[0] == 0
    card = hub.repositories[REPOSITORY].files["README.md"]
    assert card.decode().rstrip() in shown
    front = front_of(card)
    assert front["library_name"] == "gguf" and front["pipeline_tag"] == "text-generation"
    assert {"kolotune", "lora", "gguf", "ollama"} <= set(front["tags"])  # type: ignore[call-overload]
    assert not {"base_model", "license", "datasets"} & set(front)  # a folder of this machine
    text = card.decode()
    facts = read_manifest(RunFolder(finished.output_dir).manifest).facts_of("train")
    for fact in (
        "ollama create my-model -f ModelfileQ4_K_M",
        f"hf download {REPOSITORY} --local-dir model",
        f"| loss at the last step | {facts['final_loss']:.4f} |",
        "rank 2, alpha 32.0",
        hashlib.sha256(RunFolder(finished.output_dir).gguf.read_bytes()).hexdigest(),
    ):
        assert fact in text, fact
    assert "What is 1 plus 1" not in text and str(finished.output_dir) not in text


@pytest.mark.parametrize(
    ("name", "base", "license"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("META-LLAMA/llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("someone/a-model", "someone/a-model", None),
    ],
)
@pytest.mark.parametrize(
    ("what", "library", "relation"), [("adapter", "peft", "adapter"), ("merged", "transformers", "finetune")]
)
def test_base_and_license_of_the_card(
    name: str,
    base: str,
    license: str | None,
    what: model_card.ResultKind,
    library: str,
    relation: str,
    finished: Config,
) -> None:
    import dataclasses

    loaded = read_manifest(RunFolder(finished.output_dir).manifest)
    card = model_card.make_model_card(dataclasses.replace(loaded, base=BaseModel(name, "")), "a/b", what, {})
    front = front_of(card.encode())
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (base, relation, library)
    assert front.get("license") == license
    assert ("PeftModel" in card) == (what == "adapter")


@pytest.mark.parametrize(
    ("where", "status", "error"),
    [
        ("repos/create", 401, AccessError),
        ("repos/create", 403, AccessError),
        ("preupload", 403, AccessError),
        ("objects/batch", 403, AccessError),
        ("/commit/", 401, AccessError),
        ("/commit/", 409, HubError),
        ("/commit/", 412, HubError),
        ("/commit/", 413, HubError),
        ("/commit/", 500, OfflineError),
        ("/storage/", 403, AccessError),
        ("/verify", 422, HubError),
        ("api/models", 404, ModelNotFoundError),
    ],
)
def test_refusals(
    where: str, status: int, error: type[KolotuneError], push: Callable[..., tuple[int, str]], hub: Hub
) -> None:
    hub.refuse[where] = status
    code, output = push("adapter")
    assert code == error.exit_code and REPOSITORY in output and str(status) in output, output
    if REPOSITORY in hub.repositories:
        assert hub.repositories[REPOSITORY].files == {}


@pytest.mark.parametrize("where", ["repos/create", "/commit/", pytest.param("/storage/", marks=pytest.mark.slow)])
def test_a_hub_that_stops_answering(
    where: str, push: Callable[..., tuple[int, str]], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.silent.add(where)
    code, output = push("adapter")
    assert code == OfflineError.exit_code and REPOSITORY in output, output
    assert len([path for _, path, _ in hub.seen if where in path]) <= 6
    hub.silent.clear()
    assert push("adapter")[0] == 0


def test_a_public_repository_is_not_pushed_to_by_mistake(push: Callable[..., tuple[int, str]], hub: Hub) -> None:
    hub.repositories[REPOSITORY] = Repository(private=False)
    code, output = push("adapter")
    assert code == HubError.exit_code and "is public" in output
    assert hub.repositories[REPOSITORY].files == {}
    assert push("adapter", "--public")[0] == 0
    del hub.repositories[REPOSITORY]
    assert push("adapter", "--public")[0] == 0 and not hub.repositories[REPOSITORY].private


def test_a_token_that_the_hub_does_not_know(
    push: Callable[..., tuple[int, str]], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    code, output = push("adapter")
    assert code == AccessError.exit_code and "hf_other" not in output
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert push("adapter", "--hf-token", str(tmp_path / "token"))[0] == 0
    code, output = push("adapter", "--hf-token", "hf_" + "x" * 30)
    assert code == ConfigError.exit_code and "x" * 30 not in output


def test_nothing_is_sent_that_is_not_what_was_made(
    hub: Hub, run_copy: RunFolder, kolotune: Callable[..., tuple[int, str]]
) -> None:
    with run_copy.gguf.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    code, output = kolotune("push", run_copy.root, REPOSITORY, "--what", "gguf")
    assert code == ManifestError.exit_code and "Merged.gguf" in output
    run_copy.manifest.unlink()
    code, output = kolotune("push", run_copy.root, REPOSITORY, "--what", "adapter")
    assert code == ManifestError.exit_code and hub.seen == []
    for name in ("my-model", "a/b/c", "../x/y", "a/.."):
        assert kolotune("push", run_copy.root, name, "--what", "adapter")[0] == ConfigError.exit_code


def test_the_program_itself_finds_the_hub_and_keeps_the_token(finished: Config) -> None:
    with serving() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        argv = [sys.executable, "-m", "kolotune", "push", str(finished.output_dir), REPOSITORY, "--what", "adapter"]
        completed = subprocess.run(
            [*argv, "--hf-token", "-"], input=TOKEN + "\n", env=env, capture_output=True, text=True, timeout=120
        )
        assert completed.returncode == 0, completed.stderr
        assert "adapter_model.safetensors" in hub.repositories[REPOSITORY].files
        assert TOKEN not in completed.stdout + completed.stderr
    completed = subprocess.run(
        [*argv, "--hf-token", "-"], input=TOKEN + "\n", env=env, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == OfflineError.exit_code and "can't be reached" in completed.stderr
