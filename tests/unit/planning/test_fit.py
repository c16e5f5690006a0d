"""A plan, compared with the run that follows; runs that do not fit are refused with advice that helps."""

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
from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import SpaceError
from kolotune.foundation.files import size_of
from kolotune.pipeline.stages import STAGES
from kolotune.planning import fit, needs, network
from kolotune.planning.advice import AdviceKind
from kolotune.planning.export_sizes import measure_exports
from kolotune.planning.gaps import GapKind
from kolotune.planning.needs import Needs, estimate_needs
from kolotune.planning.workload import read_workload
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.retention import stages_skipped_by_lean
from kolotune.run_folder.stage import Context
from kolotune.weights.model_shape import AdapterShape, read_shape


def test_export_sizes_match_the_files(finished: Config, tiny_base: Path, tmp_path: Path) -> None:
    run = RunFolder(finished.output_dir)
    sizes = measure_exports(Context(finished, run, tiny_base), tmp_path / "log")
    assert sizes.is_exact
    assert sizes.gguf == size_of(run.gguf)
    assert sizes.merged == pytest.approx(size_of(run.merged_model), rel=0.001)
    assert sizes.quantized["Q4_K_M"].size == size_of(run.quantized("Q4_K_M"))


def test_a_second_run_reuses_the_disk_space_of_the_first(finished: Config, tiny_base: Path, tmp_path: Path) -> None:
    context = Context(finished, RunFolder(finished.output_dir), tiny_base)
    names = {"merge", "convert", "quantize"}
    workload = read_workload(context.run.prepared, finished, tmp_path / "log")
    needed = estimate_needs(context, names, tmp_path / "log", workload)
    largest = max(use.stays for use in needed.disk.values())
    assert needed.end == pytest.approx(0, abs=5_000)
    assert needed.peak == pytest.approx(largest, rel=0.01)


def test_importance_matrices_and_trial_quantizations_are_counted(
    finished: Config, tiny_base: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    workload = read_workload(RunFolder(finished.output_dir).prepared, finished, tmp_path / "log")

    def estimate(**changes: Any) -> Needs:
        context = Context(dataclasses.replace(finished, **changes), run, tiny_base)
        return estimate_needs(context, {"train", "quantize", "compare"}, tmp_path / "log", workload)

    with_matrix, plain = estimate(quantization=("Q2_K",)), estimate(quantization=("Q2_K",), importance_matrix="never")
    reading, quantizing = with_matrix.memory["quantize"], plain.memory["quantize"]
    assert reading is not None and quantizing is not None and reading.resident > quantizing.resident
    assert 0 < with_matrix.disk["quantize"].stays - plain.disk["quantize"].stays < 20_000
    assert GapKind.QUANTIZED_SIZES not in {gap.kind for gap in estimate(quantization=("IQ2_XS",)).gaps}
    assert "compare" not in plain.disk and plain.disk.keys() == estimate(compare_quantization=("Q4_K_M",)).disk.keys()
    sizes = measure_exports(Context(finished, run, tiny_base), tmp_path / "log")
    assert estimate(quantization=("IQ2_XS",)).disk["quantize"].stays < sizes.gguf
    assert estimate(compare_quantization=("Q8_0",)).disk["compare"].passes == sizes.gguf
    assert estimate(compare_quantization=("Q8_0",), lean=True).disk["compare"].passes == 2 * sizes.gguf


def test_a_plan_predicts_the_run_and_leaves_no_files(
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
    assert plan["work"]["steps"] == max(line["step"] for line in metrics)
    assert plan["facts"] == json.loads(run.record("prepare").read_text())["facts"]
    assert plan["conversion"] is True
    assert plan["disk_end"] == pytest.approx(size_of(run.root), rel=0.05)
    assert set(plan["seconds"]) >= {"prepare", "train", "merge", "convert", "quantize"}
    assert all(seconds >= 0 for seconds in plan["seconds"].values())
    assert plan["memory_peak"] > 2e8
    code, output = kolotune("plan", *arguments, "--no-measure")
    assert code == 0
    assert "everything is done" in output


def test_a_plan_for_several_machines_estimates_their_traffic(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    arguments = [
        "plan", write_chats(12), "--base-model", tiny_base, "--output-dir", tmp_path / "run", "--lora-rank", "2",
        "--nnodes", "2", "--nproc", "2", "--rdzv", "10.0.0.1:29500", "--no-compare",
    ]  # fmt: skip
    code, output = kolotune(*arguments, "--link-mbit", "1", "--json")
    assert code == 0, output
    traffic = next(event["plan"] for event in map(json.loads, output.splitlines()) if "plan" in event)["traffic"]
    adapter = AdapterShape.of(read_shape(tiny_base), 2, ["all-linear"])
    assert traffic["step"] == network.gradient_bytes(adapter.weight_count, 4)
    assert traffic["seconds"] == network.transfer_seconds(traffic["step"], 1)
    assert traffic["computing"] > 0 and 0 < traffic["share"] < 1 and traffic["enough"] >= 1
    code, output = kolotune(*arguments, "--no-measure")
    assert code == 0 and "a step" in output and "--link-mbit" in output


def test_a_plan_counts_memory_and_traffic_of_a_sharded_base(
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
    layers = sum(linear.weight_count for linear in shape.linears)
    # Two batches in each of the four processes; every batch gathers the layers twice and passes on 3/4 of them.
    assert plan["traffic"]["base"] == 2 * 2 * layers * 4 * 3 // 4
    gradients = network.gradient_bytes(AdapterShape.of(shape, 2, ["all-linear"]).weight_count, 4)
    assert plan["traffic"]["step"] == gradients + plan["traffic"]["base"]
    assert plan["traffic"]["enough"] is None, "more batches would send the base more often"
    assert plan["memory"]["train"]["own"] > 0
    assert any(gap.startswith("time: ") for gap in plan["unknown"])


def _huge_base(folder: Path, tiny: Path, layers: int) -> Path:
    """Make a model folder with the headers of a huge model, whose weights are a hole in the disk."""
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
    header: dict[str, object] = {}
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
    """Return the layers of such a model whose weights in bf16 take that many times the free memory."""
    a_layer = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 32768)
    return max(2, int(weights_in_memory * hardware.free_memory() / a_layer))


def test_a_run_that_does_not_fit_in_memory_is_refused_before_it_starts(
    kolotune: Callable[..., tuple[int, str]], write_chats: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = _huge_base(tmp_path / "huge", tiny_base, _layers_for(6))  # in 4 bits it does not fit, either
    out = tmp_path / "run"
    code, output = kolotune("run", write_chats(3), "--base-model", base, "--output-dir", out, "--dtype", "bf16")
    assert code == SpaceError.exit_code
    assert "of memory" in output
    assert "--base-model" in output
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
    needed = estimate_needs(context, names, tmp_path / "log").memory["train"]
    assert needed is not None
    monkeypatch.setattr(hardware, "free_memory", lambda: needed.own - 500_000_000)
    with pytest.raises(SpaceError, match=r"train .* of memory"):
        fit.require_fit(context, names, tmp_path / "log")
    needs_now = estimate_needs(context, names, tmp_path / "log")
    (shortage,) = fit.find_shortages(needs_now, context, None, names, tmp_path / "log")
    assert (shortage.resource, shortage.where) == (fit.Resource.MEMORY, "train")
    assert shortage.advice.kind is AdviceKind.GIVE_OPTIONS
    option, value = shortage.advice.options.split()
    changed = {**values, option[2:].replace("-", "_"): value}
    other = Context(configs.resolve((changed, "test", tmp_path)), context.run, base)
    fit.require_fit(other, names, tmp_path / "log")


def test_on_a_cpu_4_bits_are_advised_where_nothing_else_makes_it_fit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _huge_base(tmp_path / "huge", tiny_base, 8)
    values = {"base_model": str(base), "output_dir": tmp_path / "run", "dtype": hardware.best_dtype(), "lora_rank": 8}
    names, log = {"train"}, tmp_path / "log"
    contexts = [
        Context(configs.resolve(({**values, **more}, "test", tmp_path)), RunFolder(tmp_path / "run"), base)
        for more in ({}, {"load_in_4bit": True})
    ]
    needed = [estimate_needs(context, names, log).memory["train"] for context in contexts]
    assert needed[0] is not None and needed[1] is not None and needed[1].own < needed[0].own
    monkeypatch.setattr(hardware, "free_memory", lambda: needed[1].own)
    (shortage,) = fit.find_shortages(estimate_needs(contexts[0], names, log), contexts[0], None, names, log)
    assert shortage.advice.options == "--load-in-4bit"
    fit.require_fit(contexts[1], names, log)


def test_advice_for_a_gpu_names_4_bits_where_they_make_it_fit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _huge_base(tmp_path / "huge", tiny_base, 2)
    monkeypatch.setattr(hardware, "best_device", lambda: "cuda")
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 40)
    monkeypatch.setattr(hardware, "memory_for_processes", lambda count: count << 40)
    values = {"base_model": str(base), "output_dir": tmp_path / "run", "dtype": "bf16", "lora_rank": 8}
    names, log = {"train"}, tmp_path / "log"

    def needs_of(**more: Any) -> tuple[Context, Needs]:
        context = Context(configs.resolve(({**values, **more}, "test", tmp_path)), RunFolder(tmp_path / "run"), base)
        return context, estimate_needs(context, names, log)

    (context, roomy), (_, narrow) = needs_of(), needs_of(load_in_4bit=True)
    assert roomy.gpu is not None and narrow.gpu is not None and roomy.memory["train"] is not None
    assert not roomy.gaps and narrow.gpu.needed < roomy.gpu.needed
    monkeypatch.setattr(hardware, "memory_for_processes", lambda count: count * narrow.gpu.needed)
    with pytest.raises(SpaceError, match=r"of the GPU's memory") as refused:
        fit.require_fit(context, names, log)
    assert "--load-in-4bit" in refused.value.hint
    fit.require_fit(needs_of(load_in_4bit=True)[0], names, log)
    monkeypatch.setattr(hardware, "memory_for_processes", lambda count: count * narrow.gpu.needed // 2)
    (shortage,) = fit.find_shortages(needs_of()[1], context, None, names, log)
    assert shortage.resource is fit.Resource.GPU_MEMORY
    assert shortage.advice.options != "--load-in-4bit"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"merge_dtype": "fp32"}, "--merge-dtype f16"),
        ({}, "--lean"),
        ({"lean": True, "quantization": ("Q4_K_M", "Q8_0")}, "--quantization Q4_K_M"),
    ],
)
def test_disk_advice_names_the_option_that_makes_it_fit(
    finished: Config,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    advice: str,
) -> None:
    config = dataclasses.replace(finished, output_dir=tmp_path / "run", **options)
    context = Context(config, RunFolder(tmp_path / "run"), tiny_base)
    names = {stage.NAME for stage in STAGES if stage.NAME not in stages_skipped_by_lean(config)}
    needed = estimate_needs(context, names, tmp_path / "log").peak
    monkeypatch.setattr(needs, "free_space", lambda _: needed - 1000)
    with pytest.raises(SpaceError, match=r"needs about .* but only .* are free"):
        fit.require_fit(context, names, tmp_path / "log")
    needs_now = estimate_needs(context, names, tmp_path / "log")
    (shortage,) = fit.find_shortages(needs_now, context, None, names, tmp_path / "log")
    assert (shortage.resource, shortage.advice.options) == (fit.Resource.DISK, advice)


def test_unknown_training_memory_is_reported_as_a_gap(
    run_copy: RunFolder, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOLOTUNE_PACKED_STEP", "off")
    config = config_of(run_copy, load_in_4bit=True)
    needed = estimate_needs(Context(config, run_copy, tiny_base), {"train"}, tmp_path / "log")
    assert needed.memory["train"] is None
    assert [gap.kind for gap in needed.gaps] == [GapKind.MEMORY_IN_4BIT]
