"""What a run would take, against what it made; and runs that can't fit are refused with advice that helps."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import config_of

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.engines.estimates import Adapter, read_shape
from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import SpaceError
from kolotune.foundation.files import size_of
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline import run as pipeline
from kolotune.planning import fit, network
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import Context


def test_the_sizes_of_exports_are_those_that_were_made(finished: Config, tiny_base: Path, tmp_path: Path) -> None:
    run = RunFolder(finished.output_dir)
    sizes = fit.exported(Context(finished, run, tiny_base), tmp_path / "log")
    assert sizes.told
    assert sizes.gguf == size_of(run.gguf)
    assert sizes.merged == pytest.approx(size_of(run.merged_model), rel=0.001)
    assert sizes.quantized["Q4_K_M"].size == pytest.approx(size_of(run.quantized("Q4_K_M")), abs=256)


def test_a_folder_that_is_there_does_not_need_its_room_again(finished: Config, tiny_base: Path, tmp_path: Path) -> None:
    context = Context(finished, RunFolder(finished.output_dir), tiny_base)
    names = {"merge", "convert", "quantize"}
    work = fit.work_of(context.run.prepared, finished)
    found = fit.needs(context, names, tmp_path / "log", work)
    largest = max(each.stays for each in found.disk.values())
    assert found.end == pytest.approx(0, abs=5_000)
    assert found.peak == pytest.approx(largest, rel=0.01)


def test_an_importance_matrix_and_what_is_only_tried_are_counted(
    finished: Config, tiny_base: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    work = fit.work_of(RunFolder(finished.output_dir).prepared, finished)

    def needs(**changes: Any) -> fit.Needs:
        config = dataclasses.replace(finished, **changes)
        return fit.needs(Context(config, run, tiny_base), {"train", "quantize", "compare"}, tmp_path / "log", work)

    weighted, plain = needs(quantization=("Q2_K",)), needs(quantization=("Q2_K",), importance_matrix="never")
    read, quantized = weighted.memory["quantize"], plain.memory["quantize"]
    assert read is not None and quantized is not None and read.resident > quantized.resident
    assert 0 < weighted.disk["quantize"].stays - plain.disk["quantize"].stays < 20_000
    assert not any("sizes of quantizations" in each for each in needs(quantization=("IQ2_XS",)).unknown)
    assert "compare" not in plain.disk and plain.disk.keys() == needs(compare_quantization=("Q4_K_M",)).disk.keys()
    sizes = fit.exported(Context(finished, run, tiny_base), tmp_path / "log")
    assert needs(quantization=("IQ2_XS",)).disk["quantize"].stays < sizes.gguf
    assert needs(compare_quantization=("Q8_0",)).disk["compare"].passes == sizes.gguf
    assert needs(compare_quantization=("Q8_0",), lean=True).disk["compare"].passes == 2 * sizes.gguf


def test_a_plan_foretells_a_run_and_leaves_nothing(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    chats = write_chats(12)
    before = sorted(tmp_path.rglob("*"))
    arguments = [
        chats, "--base-model", tiny_base, "--output-dir", tmp_path / "run", "--epochs", "2", "--eval-split", "0.2",
        "--dtype", "fp32", "--lora-rank", "2", "--batch-size", "3", "--no-compare",
    ]  # fmt: skip
    code, output = kolotune("plan", *arguments, "--json")
    assert code == 0, output
    assert sorted(tmp_path.rglob("*")) == before
    events = [json.loads(line) for line in output.splitlines()]
    plan = next(event["plan"] for event in events if "plan" in event)
    assert kolotune("run", *arguments)[0] == 0
    run = RunFolder(tmp_path / "run")
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert plan["work"]["steps"] == max(each["step"] for each in metrics)
    assert plan["facts"] == json.loads(run.record("prepare").read_text())["facts"]
    assert plan["conversion"] is True
    assert plan["disk_end"] == pytest.approx(size_of(run.root), rel=0.05)
    assert set(plan["seconds"]) >= {"prepare", "train", "merge", "convert", "quantize"}
    assert all(each >= 0 for each in plan["seconds"].values())
    assert plan["memory_peak"] > 2e8
    code, output = kolotune("plan", *arguments, "--no-measure")
    assert code == 0
    assert "everything is done" in output


def test_a_plan_for_several_machines_tells_what_they_send(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    arguments = [
        "plan", write_chats(12), "--base-model", tiny_base, "--output-dir", tmp_path / "run", "--lora-rank", "2",
        "--nnodes", "2", "--nproc", "2", "--rdzv", "10.0.0.1:29500", "--no-compare",
    ]  # fmt: skip
    code, output = kolotune(*arguments, "--link-mbit", "1", "--json")
    assert code == 0, output
    found = next(event["plan"] for event in map(json.loads, output.splitlines()) if "plan" in event)["traffic"]
    adapter = Adapter.of(read_shape(tiny_base), 2, ["all-linear"])
    assert found["step"] == network.of_step(adapter.weights, 4)
    assert found["seconds"] == network.seconds(found["step"], 1)
    assert found["computing"] > 0 and 0 < found["share"] < 1 and found["enough"] >= 1
    code, output = kolotune(*arguments, "--no-measure")
    assert code == 0 and "from and to each machine" in output and "--link-mbit says how fast it is" in output


def test_a_plan_for_a_parted_base_counts_what_it_holds_and_sends(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    arguments = [
        "plan", write_chats(12), "--base-model", tiny_base, "--output-dir", tmp_path / "run", "--lora-rank", "2",
        "--nnodes", "2", "--nproc", "2", "--rdzv", "10.0.0.1:29500", "--sharding", "on", "--no-compare",
        "--dtype", "fp32", "--gradient-accumulation", "8", "--link-mbit", "1",
    ]  # fmt: skip
    code, output = kolotune(*arguments, "--json")
    assert code == 0, output
    plan = next(event["plan"] for event in map(json.loads, output.splitlines()) if "plan" in event)
    shape = read_shape(tiny_base)
    layers = sum(each.outputs * each.inputs for each in shape.linears)
    # Two batches in each of the four processes; every batch needs the layers twice, and passes on 3/4 of them.
    assert plan["traffic"]["base"] == 2 * 2 * layers * 4 * 3 // 4
    gradients = network.of_step(Adapter.of(shape, 2, ["all-linear"]).weights, 4)
    assert plan["traffic"]["step"] == gradients + plan["traffic"]["base"]
    assert plan["traffic"]["enough"] is None, "more batches would bring the base more often"
    assert plan["memory"]["train"]["own"] > 0
    assert any(each.startswith("time: ") for each in plan["unknown"])


def _huge_base(folder: Path, tiny: Path, layers: int) -> Path:
    """A model folder with the headers of a huge model, whose weights are a hole in the disk."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (tiny / name).is_file():
            (folder / name).write_bytes((tiny / name).read_bytes())
    width, middle = 8192, 32768
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "hidden_size": width, "intermediate_size": middle, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [49152, width], "model.norm.weight": [width]}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        shapes |= {f"{prefix}.{name}_layernorm.weight": [width] for name in ("input", "post_attention")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": [1024, width] for name in "kv"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": [width, width] for name in "qo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": [middle, width] for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = [width, middle]
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    weights = folder / "model.safetensors"
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + at)
    return folder


def _layers_for(weights_in_memory: float) -> int:
    """Layers of such a model, of which that many times the free memory are weights in bf16."""
    a_layer = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 32768)
    return max(2, int(weights_in_memory * hardware.free_memory() / a_layer))


def test_a_run_that_does_not_fit_the_memory_is_refused_before_it_begins(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = _huge_base(tmp_path / "huge", tiny_base, _layers_for(1.5))
    out = tmp_path / "run"
    code, output = kolotune("run", write_chats(3), "--base-model", base, "--output-dir", out, "--dtype", "bf16")
    assert code == SpaceError.exit_code
    assert "train takes about" in output
    assert "of memory" in output
    assert "--base-model smollm2-135m" in output or "Give --base-model" in output
    assert not RunFolder(out).prepared.exists()
    assert not (out / "config.yaml").exists()


def test_memory_advice_names_the_option_that_makes_it_fit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _huge_base(tmp_path / "huge", tiny_base, 2)
    values = {"base_model": str(base), "output_dir": tmp_path / "run", "dtype": "fp32", "lora_rank": 512}
    config = configs.resolve((values, "test", tmp_path))
    context = Context(config, RunFolder(tmp_path / "run"), base)
    names = {"train"}
    needed = fit.needs(context, names, tmp_path / "log").memory["train"]
    assert needed is not None
    monkeypatch.setattr(hardware, "free_memory", lambda: needed.own - 500_000_000)
    with pytest.raises(SpaceError, match="train takes about") as error:
        fit.require_room(context, names, tmp_path / "log")
    advice = error.value.hint
    assert advice.startswith("Give --")
    option, value = advice.removeprefix("Give ").partition(":")[0].split()
    changed = {**values, option[2:].replace("-", "_"): value}
    other = Context(configs.resolve((changed, "test", tmp_path)), context.run, base)
    fit.require_room(other, names, tmp_path / "log")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"merge_dtype": "fp32"}, "--merge-dtype f16"),
        ({}, "--lean"),
        ({"lean": True, "quantization": ("Q4_K_M", "Q8_0")}, "--quantization Q4_K_M"),
    ],
)
def test_disk_advice_names_the_option_that_makes_it_fit(
    finished: Config, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, advice: str
) -> None:
    import dataclasses
    import shutil

    config = dataclasses.replace(finished, output_dir=tmp_path / "run", **options)
    context = Context(config, RunFolder(tmp_path / "run"), tiny_base)
    names = {stage.NAME for stage in pipeline.STAGES if stage.NAME not in pipeline.left_out(config)}
    needed = fit.needs(context, names, tmp_path / "log").peak
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1000))
    with pytest.raises(SpaceError, match=r"makes about .* but only .* are free") as error:
        fit.require_room(context, names, tmp_path / "log")
    assert f"Give {advice}:" in error.value.hint


def test_what_can_not_be_known_is_said(
    finished: Config, run_copy: RunFolder, tiny_base: Path, tmp_path: Path, reporter: PlainReporter
) -> None:
    config = config_of(run_copy, load_in_4bit=True)
    found = fit.needs(Context(config, run_copy, tiny_base), {"train"}, tmp_path / "log")
    assert found.memory["train"] is None
    assert any("bitsandbytes" in each for each in found.unknown)
