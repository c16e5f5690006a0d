"""`verify` finds and names every changed byte; `rebuild` gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import config_of, states

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, DataError, KolotuneError, ModelError, ModelNotFoundError
from kolotune.foundation.files import files_of
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import StageState
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import read_manifest
from kolotune.runs import rebuild
from kolotune.runs.verify import DifferenceKind, ManifestDifference, verify


def flip(path: Path, at: int = -1) -> None:
    """Change one bit; keep size and modification time."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def rewritten(run_copy: RunFolder, reporter: PlainReporter) -> RunFolder:
    """The copied run, with its own paths in the manifest."""
    run_pipeline(config_of(run_copy), reporter)
    assert verify(run_copy).differences == []
    return run_copy


def test_a_finished_run_matches_its_manifest(finished: Config, kolotune: Callable[..., tuple[int, str]]) -> None:
    findings = verify(RunFolder(finished.output_dir))
    assert findings.differences == [] and findings.unchecked == []
    assert findings.files > 12 and findings.bytes > 10_000_000
    code, output = kolotune("verify", finished.output_dir)
    assert code == 0 and f"{findings.files} files" in output


def test_one_bit_in_any_file_is_found(rewritten: RunFolder) -> None:
    manifest = read_manifest(rewritten.manifest)
    names = [
        f"{artifact}/{part}" if part else artifact
        for artifact, each in manifest.artifacts.items()
        for part in each.files
    ]
    assert len(names) > 12
    for name in [*names, "metrics.jsonl"]:
        path = rewritten.root / name
        if path.stat().st_size == 0:  # nothing is held out
            continue
        for at in (0, path.stat().st_size // 2, -1):
            flip(path, at)
            differences = verify(rewritten).differences
            assert [(each.kind, each.name) for each in differences] == [(DifferenceKind.CONTENT, name)]
            flip(path, at)
    assert verify(rewritten).differences == []


def test_missing_and_additional_files_are_found(rewritten: RunFolder, kolotune: Callable[..., tuple[int, str]]) -> None:
    rewritten.quantized("Q4_K_M").unlink()
    (rewritten.adapter / "adapter_config.json").unlink()
    (rewritten.merged_model / "extra.bin").write_bytes(b"x")
    with rewritten.gguf.open("ab") as file:
        file.write(b"\0")
    code, output = kolotune("verify", rewritten.root)
    assert code == 26
    for text in (
        "MergedQ4_K_M.gguf is missing",
        "adapter/adapter_config.json is missing",
        "merged_model/extra.bin was not made by the run",
        "Merged.gguf has ",
        "4 differences from its manifest",
    ):
        assert text in output, output


def damaged_record(run: RunFolder, stage: str, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(run.record(stage).read_text())
    change(record)
    del record["sha256"]  # of the record as it was
    run.record(stage).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("stage", "change", "part"),
    [
        ("train", lambda record: record["facts"].update(final_loss=0.1), "facts"),
        ("train", lambda record: record["options"].update(seed=7), "options"),
        ("merge", lambda record: record["inputs"].update({"the adapter": "0" * 64}), "inputs"),
        ("prepare", lambda record: record["versions"].update(jinja2="0"), "versions"),
        ("convert", lambda record: record["outputs"]["Merged.gguf"].update(sha256="0"), "Merged.gguf"),
        ("quantize", lambda record: record["outputs"].clear(), "MergedQ4_K_M.gguf"),
        ("modelfile", lambda record: record.pop("outputs"), ""),
    ],
)
def test_records_are_compared_with_it(
    stage: str, change: Callable[[dict[str, Any]], Any], part: str, run_copy: RunFolder
) -> None:
    damaged_record(run_copy, stage, change)
    kind = DifferenceKind.RECORD if part else DifferenceKind.RECORD_MISSING
    assert ManifestDifference(kind, f".kolotune/{stage}.json", part) in verify(run_copy).differences


def test_config_data_base_and_inputs(
    rewritten: RunFolder, tmp_path: Path, tiny_base: Path, reporter: PlainReporter
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    run_pipeline(config_of(rewritten, base_model=str(tmp_path / "base")), reporter)
    assert verify(rewritten).differences == []
    text = rewritten.config.read_text()
    rewritten.config.write_text(text.replace("lora_rank: 2", "lora_rank: 3"))
    assert ManifestDifference(DifferenceKind.OPTION, "lora_rank", "2", "3") in verify(rewritten).differences
    rewritten.config.write_text(text)
    flip(tmp_path / "chats.jsonl")
    flip(tmp_path / "base" / "model.safetensors")
    found = verify(rewritten).differences
    assert [each.kind for each in found] == [DifferenceKind.SOURCE] * 2
    assert "the data" in found[0].name and "the base model" in found[1].name
    (tmp_path / "chats.jsonl").unlink()
    shutil.rmtree(tmp_path / "base")
    findings = verify(rewritten)
    assert findings.differences == [] and len(findings.unchecked) == 2
    values = json.loads(rewritten.manifest.read_text())
    values["stages"]["merge"]["inputs"]["the adapter"] = "0" * 64
    rewritten.manifest.write_text(json.dumps(values))
    found = verify(rewritten).differences
    assert ManifestDifference(DifferenceKind.STAGE_INPUT, "merge", "the adapter") in found


def test_rebuild_gives_the_same_bytes(
    rewritten: RunFolder, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    before = {name: each.sha256 for name, each in read_manifest(rewritten.manifest).artifacts.items()}
    code, output = kolotune("rebuild", rewritten.manifest, "--output-dir", tmp_path / "again")
    assert code == 0 and "all 7 results have the same hash" in output, output
    again = RunFolder(tmp_path / "again")
    hasher = Hasher()
    assert {name: hasher.of(again.root / name) for name in before} == before
    assert files_of(again.adapter)[1].read_bytes() == files_of(rewritten.adapter)[1].read_bytes()
    code, output = kolotune("rebuild", rewritten.manifest, "--output-dir", tmp_path / "again")
    assert code == ConfigError.exit_code and "is not empty" in output


def test_rebuild_reports_what_differs(
    rewritten: RunFolder, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    """As if it had been made with a different seed, torch and processor: the results that follow differ."""
    values = json.loads(rewritten.manifest.read_text())
    values["config"]["seed"] = 7
    values["versions"]["torch"] = "1.0"
    values["machine"]["processor"] = "an abacus"
    file = tmp_path / "elsewhere" / "manifest.json"
    file.parent.mkdir()
    file.write_text(json.dumps(values))
    shutil.copyfile(tmp_path / "chats.jsonl", file.parent / "chats.jsonl")
    (tmp_path / "chats.jsonl").unlink()  # the copy beside the manifest is used
    code, output = kolotune("rebuild", file, "--output-dir", tmp_path / "again")
    assert code == 26
    for name in ("adapter", "merged_model", "Merged.gguf", "MergedQ4_K_M.gguf"):
        assert f"{name} differs" in output
    assert ".kolotune/prepared differs" not in output and "Modelfile differs" not in output
    assert "an abacus" in output and "1.0" in output and "4 of 7 results differ" in output


def refused(file: Path, folder: Path, reporter: PlainReporter) -> KolotuneError:
    with pytest.raises(KolotuneError) as caught:
        rebuild.rebuild(file, folder, reporter)
    assert not folder.exists()
    return caught.value


def test_rebuild_is_refused_without_the_same_data_and_base(
    rewritten: RunFolder, tmp_path: Path, tiny_base: Path, other_weights: Path, reporter: PlainReporter
) -> None:
    again = tmp_path / "again"
    values = json.loads(rewritten.manifest.read_text())
    flip(tmp_path / "chats.jsonl")
    error = refused(rewritten.manifest, again, reporter)
    assert isinstance(error, DataError) and "is not the file that was used" in error.cause
    (tmp_path / "chats.jsonl").unlink()
    error = refused(rewritten.manifest, again, reporter)
    assert isinstance(error, DataError) and "is missing" in error.cause
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copyfile(other_weights, tmp_path / "base" / "model.safetensors")
    values["base"]["name"] = values["config"]["base_model"] = str(tmp_path / "base")
    rewritten.manifest.write_text(json.dumps(values))
    error = refused(rewritten.manifest, again, reporter)
    assert isinstance(error, ModelError) and "is not the base model that was used" in error.cause
    shutil.rmtree(tmp_path / "base")
    assert isinstance(refused(rewritten.manifest, again, reporter), ModelNotFoundError)


def test_a_template_of_the_user_is_trained_stored_and_compared(
    run_copy: RunFolder, tmp_path: Path, reporter: PlainReporter
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ thinking }}{% endif %}"
    )
    run = run_pipeline(config_of(run_copy, chat_template=own), reporter)
    trained = (run.tokenizer / "chat_template.jinja").read_text()
    assert trained == "{% set thinking = {}.undefined %}\n" + own.read_text()
    assert (run.merged_model / "chat_template.jinja").read_text() == trained
    assert set(states(run).values()) == {StageState.DONE} and verify(run).differences == []
    flip(own)
    assert states(run)["prepare"] == StageState.WILL_RUN
    assert [each.kind for each in verify(run).differences] == [DifferenceKind.SOURCE]
    error = refused(run.manifest, tmp_path / "again", reporter)
    assert isinstance(error, DataError) and "own.jinja: is not the file that was used" in error.cause
    own.unlink()
    error = refused(run.manifest, tmp_path / "again", reporter)
    assert isinstance(error, DataError) and "the chat template is missing" in error.cause


@pytest.mark.slow
def test_the_sample_run_again_in_fp32(
    tmp_path: Path, sample_chats: Path, reporter: PlainReporter, one_thread: None
) -> None:
    """The sample, twice, on the CPU in fp32: the same hashes."""
    file = sample_chats.parent / "kolotune.yaml"
    more = {"dtype": "fp32", "output_dir": tmp_path / "run"}
    config = configs.resolve((configs.load_file(file), str(file), file.parent), (more, "test", tmp_path))
    run = run_pipeline(config, reporter)
    assert verify(run).differences == []
    rebuilt = rebuild.rebuild(run.manifest, tmp_path / "again", reporter)
    assert rebuilt.different == [] and len(rebuilt.same) == 8 and rebuilt.changes == []
    assert Hasher().of(rebuilt.folder.quantized("Q4_K_M")) == Hasher().of(run.quantized("Q4_K_M"))
