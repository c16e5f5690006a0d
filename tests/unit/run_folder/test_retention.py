"""Lean runs: the same models, and nothing beside what was asked for."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import config_of, partials, states

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import conversion_source, convert, plan_cache, quantize
from kolotune.gguf.model_skeleton import read_skeleton
from kolotune.gguf.plan_cache import PlanResult
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.retention import KeptModels, kept_models
from kolotune.run_folder.stage import Context
from kolotune.serving.terminal_chat import open_chat
from kolotune.stages.merge import merge_adapter


@pytest.fixture(scope="module")
def lean_run(finished: Config, tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Config:
    """The finished run's adapter, made lean; read its folder only."""
    folder = tmp_path_factory.mktemp("lean") / "run"
    shutil.copytree(finished.output_dir, folder)
    config = dataclasses.replace(finished, output_dir=folder, lean=True)
    run_pipeline(config, reporter)
    return config


@pytest.fixture
def lean_copy(lean_run: Config, tmp_path: Path) -> Config:
    shutil.copytree(lean_run.output_dir, tmp_path / "run")
    return dataclasses.replace(lean_run, output_dir=tmp_path / "run")


def models_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".gguf" or path.name.startswith(("merged", "Mod"))}


LEAN = {"MergedQ4_K_M.gguf", "ModelfileQ4_K_M"}


def test_which_models_are_kept() -> None:
    def of(**values: Any) -> KeptModels:
        return kept_models(configs.resolve((values, "test", Path.cwd())))

    assert of() == KeptModels(True, True, ("Q4_K_M",))
    assert of(quantization="none") == KeptModels(True, True, ())
    assert of(lean=True, quantization="Q8_0,Q4_K_M") == KeptModels(False, False, ("Q8_0", "Q4_K_M"))
    assert of(lean=True, quantization="none") == KeptModels(False, True, ())


def test_a_run_that_becomes_lean_keeps_what_was_requested(lean_run: Config, finished: Config) -> None:
    run, whole = RunFolder(lean_run.output_dir), RunFolder(finished.output_dir)
    assert models_in(run.root) == LEAN and partials(run) == []
    assert states(run) == dict.fromkeys(("prepare", "train", "quantize", "modelfile"), "done")
    assert not run.record("merge").exists() and not run.record("convert").exists()
    assert hash_file(run.quantized("Q4_K_M")) == hash_file(whole.quantized("Q4_K_M"))
    quantized, adapter = read_record(run, "quantize"), read_record(run, "train")
    assert quantized is not None and set(quantized.inputs) == {"the adapter", "the base model", "the tokenizer"}
    assert quantized.facts["unquantized"]["sha256"] == hash_file(whole.gguf)
    assert quantized.facts["unquantized"]["streamed"] is True and quantized.facts["unquantized"]["adapted"] > 0
    assert adapter == read_record(whole, "train"), "it was not trained again"


def test_a_second_run_does_nothing(lean_copy: Config, capsys: Any, reporter: PlainReporter) -> None:
    run_pipeline(lean_copy, reporter)
    printed = capsys.readouterr().out
    assert printed.count("done before, nothing it depends on has changed") == 4 and "..." not in printed


def test_a_different_quantization_neither_trains_nor_leaves_files(
    lean_copy: Config, capsys: Any, monkeypatch: Any, reporter: PlainReporter
) -> None:
    seen: list[list[str]] = []
    real = quantize.quantize_file

    def watched(source: Path, *more: Any) -> None:
        seen.append(sorted(path.name for path in lean_copy.output_dir.glob("*.gguf")))
        assert not RunFolder(lean_copy.output_dir).merged_model.exists()
        real(source, *more)

    monkeypatch.setattr(quantize, "quantize_file", watched)
    run = run_pipeline(dataclasses.replace(lean_copy, quantization=("Q8_0", "Q4_K_M")), reporter)
    assert seen == [["Merged.gguf", "MergedQ4_K_M.gguf"]], "only what was missing was made"
    assert models_in(run.root) == LEAN | {"MergedQ8_0.gguf", "ModelfileQ8_0"}
    printed = capsys.readouterr().out
    assert "... train" not in printed and "... prepare" not in printed
    assert set(states(run).values()) == {"done"}


def test_the_same_gguf_as_from_a_merged_folder(lean_copy: Config, finished: Config, reporter: PlainReporter) -> None:
    run = run_pipeline(dataclasses.replace(lean_copy, quantization=("NONE",)), reporter)
    assert hash_file(run.gguf) == hash_file(RunFolder(finished.output_dir).gguf)
    assert not run.merged_model.exists() and run.modelfile().exists()
    assert list(states(run)) == ["prepare", "train", "convert", "quantize", "modelfile"]
    assert set(states(run).values()) == {"done"}


def test_no_longer_lean(lean_copy: Config, finished: Config, reporter: PlainReporter) -> None:
    run = run_pipeline(dataclasses.replace(lean_copy, lean=False), reporter)
    whole = RunFolder(finished.output_dir)
    assert hash_file(run.gguf) == hash_file(whole.gguf) and run.merged_model.is_dir()
    assert models_in(run.root) == models_in(whole.root) and states(run) == states(whole)
    record = read_record(run, "quantize")
    assert record is not None and set(record.inputs) == {"the unquantized GGUF"} and "unquantized" not in record.facts


def test_a_converter_that_needs_a_merged_folder_has_one_for_a_while(
    lean_copy: Config, finished: Config, monkeypatch: Any, capsys: Any, reporter: PlainReporter
) -> None:
    monkeypatch.setattr(plan_cache, "find_plan", lambda *_: PlanResult(reason="a reason"))
    run = run_pipeline(dataclasses.replace(lean_copy, quantization=("NONE",)), reporter)
    assert hash_file(run.gguf) == hash_file(RunFolder(finished.output_dir).gguf)
    assert "a reason" in capsys.readouterr().out
    assert partials(run) == [] and not run.merged_model.exists()


def test_an_adapter_made_elsewhere(finished: Config, tmp_path: Path, kolotune: Any, reporter: PlainReporter) -> None:
    shutil.copytree(finished.output_dir / "adapter", tmp_path / "adapter")
    arguments = [
        "export",
        tmp_path / "adapter",
        "--base",
        finished.base_model,
        "--quantization",
        "Q8_0",
        "--no-compare",
    ]
    for name, more in (("whole", []), ("lean", ["--lean"])):
        code, printed = kolotune(*arguments, "--output-dir", tmp_path / name, *more)
        assert code == 0, printed
    whole, lean = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "lean")
    assert models_in(lean.root) == {"MergedQ8_0.gguf", "ModelfileQ8_0"}
    assert hash_file(lean.quantized("Q8_0")) == hash_file(whole.quantized("Q8_0"))
    assert lean.modelfile("Q8_0").read_text() == whole.modelfile("Q8_0").read_text()
    assert set(states(lean).values()) == {"done"}
    with open_chat(lean, reporter) as talk:
        assert isinstance("".join(talk.ask("Hi", temperature=0.0, max_tokens=3, seed=0)), str)
    with pytest.raises(ArtifactError, match=r"Merged\.gguf.*MergedQ8_0\.gguf"):
        open_chat(lean, reporter, quantization="none")


def test_verbs_refuse_what_a_lean_run_does_not_keep(lean_copy: Config, kolotune: Any) -> None:
    code, printed = kolotune("merge", lean_copy.output_dir)
    assert code != 0 and "lean" in printed and "--no-lean" in printed
    code, printed = kolotune("merge", lean_copy.output_dir, "--no-lean")
    assert code == 0 and (lean_copy.output_dir / "merged_model").is_dir()
    code, printed = kolotune("quantize", lean_copy.output_dir, "--lean", "--quantization", "Q8_0")
    assert code == 0, printed
    assert not (lean_copy.output_dir / "merged_model").exists()
    assert (lean_copy.output_dir / "MergedQ8_0.gguf").is_file()
    assert not (lean_copy.output_dir / "Merged.gguf").exists()


def test_a_kill_loses_nothing(lean_copy: Config, reporter: PlainReporter) -> None:
    run = RunFolder(lean_copy.output_dir)
    argv = [sys.executable, "-m", "kolotune", "quantize", str(run.root), "--quantization", "Q8_0,Q6_K,Q4_K_M"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not run.gguf.exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.gguf.exists() and states(run)["quantize"] == "interrupted"
    assert states(run)["train"] == "done"
    config = config_of(run, quantization="Q8_0,Q6_K,Q4_K_M")
    run_pipeline(config, reporter)
    assert models_in(run.root) == LEAN | {
        "MergedQ8_0.gguf", "ModelfileQ8_0", "MergedQ6_K.gguf", "ModelfileQ6_K"
    }  # fmt: skip
    assert partials(run) == [] and set(states(run).values()) == {"done"}


def test_the_preflight_makes_the_conversion_plan_that_is_needed(
    finished: Config, tmp_path: Path, reporter: PlainReporter
) -> None:
    """Before anything is prepared, from the prepared tokenizer, and of the merged folder: one and the same."""
    base, done = Path(finished.base_model), RunFolder(finished.output_dir)
    config = dataclasses.replace(finished, output_dir=tmp_path)
    lean = Context(dataclasses.replace(config, lean=True), RunFolder(tmp_path), base)
    early, kind = conversion_source.expected_skeleton(lean)
    later, _ = conversion_source.expected_skeleton(Context(finished, done, base))
    assert kind == "f16" and early.digest() == later.digest() == read_skeleton(done.merged_model).digest()


def test_weights_that_f16_can_not_hold(
    finished: Config, tiny_base: Path, tmp_path: Path, capsys: Any, reporter: PlainReporter
) -> None:
    """They are found while the GGUF is written in f16, which then starts again in f32: as from a merged folder."""
    from safetensors.torch import load_file, save_file

    base, adapter = tmp_path / "base", finished.output_dir / "adapter"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "merged").mkdir()
    options: dict[str, Any] = {"tokenizer": base, "dtype": "f16", "reporter": reporter}
    merge_adapter(adapter, base, tmp_path / "merged", **options)
    whole = convert.convert_folder(tmp_path / "merged", tmp_path / "whole.gguf", tmp_path / "log", reporter)
    capsys.readouterr()
    lean = convert.convert_adapter(
        adapter, base, name="merged", target=tmp_path / "lean.gguf", log=tmp_path / "log", **options
    )
    assert hash_file(tmp_path / "lean.gguf") == hash_file(tmp_path / "whole.gguf")
    assert lean["stored_wider"] == ["model.layers.1.mlp.up_proj.weight"]
    assert lean["type"] == whole["type"] == "f32" and lean["streamed"] and whole["streamed"]
    assert "wider" in capsys.readouterr().out
