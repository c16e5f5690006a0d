"""The manifest: made from records that belong together, and from nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import STAGES_WITHOUT_COMPARE, config_of

from kolotune.base_models import lookup
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ManifestError
from kolotune.foundation.files import size_of
from kolotune.foundation.hashing import Hasher, hash_file
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import BaseModel, Data, DataFile, ExportedModel, Manifest, read_manifest
from kolotune.run_folder.records import read_record
from kolotune.version import VERSION


def test_it_ties_everything_together(finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    manifest = read_manifest(run.manifest)
    assert manifest.data.files == [DataFile("training", str(finished.train_data[0]), hash_file(finished.train_data[0]))]
    assert manifest.data.counts["chats"] == 3
    base = lookup.locate(finished.base_model)
    assert base is not None and manifest.base == BaseModel(finished.base_model, Hasher().of(base))
    assert manifest.source is None
    assert manifest.config["lora_rank"] == 2 and manifest.config["dtype"] == "fp32"
    assert manifest.versions["kolotune"] == VERSION and {"python", "torch", "llama.cpp"} <= set(manifest.versions)
    assert {"system", "processor", "instructions", "cores"} <= set(manifest.machine)
    assert manifest.facts_of("train")["threads"] >= 1
    assert set(manifest.stages) == set(STAGES_WITHOUT_COMPARE)
    for name in ("adapter", "merged_model", "Merged.gguf", "MergedQ4_K_M.gguf", "Modelfile", ".kolotune/prepared"):
        artifact = manifest.artifacts[name]
        assert artifact.sha256 == Hasher().of(run.root / name)
        assert artifact.size == size_of(run.root / name) == sum(each.size for each in artifact.files.values())
    weights = manifest.artifacts["adapter"].files["adapter_model.safetensors"]
    assert weights.sha256 == hash_file(run.adapter / "adapter_model.safetensors")
    assert manifest.notes["metrics.jsonl"].sha256 == hash_file(run.metrics)


def test_a_run_that_does_nothing_leaves_it_untouched(run_copy: RunFolder, reporter: PlainReporter) -> None:
    run_pipeline(config_of(run_copy), reporter)  # the copy has other paths
    before = run_copy.manifest.stat()
    run_pipeline(config_of(run_copy), reporter)
    assert run_copy.manifest.stat().st_mtime_ns == before.st_mtime_ns


def test_it_is_removed_when_stages_no_longer_belong_together(run_copy: RunFolder, reporter: PlainReporter) -> None:
    run_pipeline(config_of(run_copy, lora_alpha=7), reporter, ["train"])
    assert not run_copy.manifest.exists()  # the merged model is from the adapter before
    run_pipeline(config_of(run_copy, lora_alpha=7), reporter)
    manifest = read_manifest(run_copy.manifest)
    assert manifest.config["lora_alpha"] == 7
    assert manifest.stages["merge"].inputs["the adapter"] == manifest.artifacts["adapter"].sha256


def test_one_repeated_stage_changes_only_its_part(run_copy: RunFolder, reporter: PlainReporter) -> None:
    before = read_manifest(run_copy.manifest)
    run_pipeline(config_of(run_copy, system="Be brief."), reporter, ["modelfile"])
    after = read_manifest(run_copy.manifest)
    changed = {name for name in after.artifacts if after.artifacts[name] != before.artifacts.get(name)}
    assert changed == {"Modelfile", "ModelfileQ4_K_M"}
    assert after.config["system"] == "Be brief."


def test_the_hub_token_is_nowhere_in_it(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "sEcReT" * 5
    (tmp_path / "token").write_text(secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    run_pipeline(config_of(run_copy, hf_token=str(tmp_path / "token"), system="Hi"), reporter, ["modelfile"])
    text = run_copy.manifest.read_text()
    assert secret not in text and "hf_token" not in text and str(tmp_path / "token") not in text
    for stage in read_manifest(run_copy.manifest).stages:
        assert secret not in run_copy.record(stage).read_text()


def test_the_machine_is_no_reason_to_run_a_stage_again(run_copy: RunFolder) -> None:
    record = read_record(run_copy, "train")
    assert record is not None and record.machine["cores"]
    moved = dataclasses.replace(record, machine={"processor": "a different one"})
    run_copy.record("train").write_text(json.dumps(dataclasses.asdict(moved)))
    assert {each.state for each in read_status(run_copy)} == {"done"}


@pytest.mark.parametrize("damage", ["[]", "{}", "{", '{"format": 99}', "[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(damage)
    with pytest.raises(ManifestError):
        read_manifest(file)
    with pytest.raises(ManifestError, match="there is no manifest"):
        read_manifest(tmp_path / "none.json")


@pytest.mark.parametrize("part", [each.name for each in dataclasses.fields(Manifest) if each.name != "source"])
def test_a_manifest_that_lacks_a_part_is_refused(part: str, finished: Config, tmp_path: Path) -> None:
    values: dict[str, Any] = json.loads(RunFolder(finished.output_dir).manifest.read_text())
    file = tmp_path / "manifest.json"
    for wrong in (None, 3, {part: 3}):
        file.write_text(json.dumps({**values, part: wrong}))
        if not (wrong == {part: 3} and part in ("config", "versions", "machine", "notes")):
            with pytest.raises(ManifestError):
                read_manifest(file)
    del values[part]
    file.write_text(json.dumps(values))
    with pytest.raises(ManifestError):
        read_manifest(file)


def test_an_export_of_an_adapter_made_elsewhere(
    finished: Config, tmp_path: Path, reporter: PlainReporter, kolotune: Callable[..., tuple[int, str]]
) -> None:
    shutil.copytree(RunFolder(finished.output_dir).adapter, tmp_path / "elsewhere")
    code, output = kolotune(
        "export", tmp_path / "elsewhere", "--base", finished.base_model, "--output-dir", tmp_path / "out"
    )
    assert code == 0, output
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert set(manifest.stages) == {"merge", "convert", "quantize", "modelfile", "compare"}
    assert manifest.source == ExportedModel(str(tmp_path / "elsewhere"), Hasher().of(tmp_path / "elsewhere"))
    assert manifest.data == Data([], {}) and manifest.notes == {}
    code, output = kolotune("verify", tmp_path / "out")
    assert code == 0, output
    (tmp_path / "elsewhere" / "adapter_config.json").write_text("{}")
    code, output = kolotune("rebuild", tmp_path / "out", "--output-dir", tmp_path / "rebuilt")
    assert code == 11 and "is not the" in output, output
