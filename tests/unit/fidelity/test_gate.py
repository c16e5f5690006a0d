"""The gate: an unharmed run passes; of each planted fault the stage is named, though all hashes agree.

The measuring is done in this process, which takes a tenth of the time; `test_command.py` has it in its own.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import faults

from kolotune.fidelity import measure_gguf, measure_models
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation.config import Config
from kolotune.foundation.errors import FidelityError, KolotuneError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import header
from kolotune.gguf.convert import convert_folder
from kolotune.pipeline.stages import STAGES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.reasons import find_reasons
from kolotune.stages import compare


@pytest.fixture(autouse=True)
def measured_here(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    def measure(run: RunFolder, kind: str, file: Path, reporter: Any) -> None:
        del run, reporter
        (measure_models if kind == "models" else measure_gguf).measure(file)

    monkeypatch.setattr(compare, "_in_a_process", measure)


@pytest.fixture
def harmed(learnt: Config, tmp_path: Path) -> Config:
    """A copy of the finished run, to plant faults in."""
    shutil.copytree(learnt.output_dir, tmp_path / "run")
    return dataclasses.replace(learnt, output_dir=tmp_path / "run")


def compared(config: Config, reporter: PlainReporter) -> Comparison:
    """What a comparison of that run finds; before it, every stage looks done."""
    faults.seal(config)
    context = faults.context_of(config)
    for stage in STAGES:
        if stage is not compare:
            assert find_reasons(stage, context) == []
    try:
        compare.run(context, reporter)
    except FidelityError as error:
        found = Comparison.read(context.run.comparison)
        assert found.failure is not None and error.cause.startswith(f"{found.failure.stage}: ")
        assert found.failure.likely_cause in error.hint
        return found
    found = Comparison.read(context.run.comparison)
    assert found.passed and all(each.passed for each in found.checked)
    return found


def test_an_unharmed_run_passes(harmed: Config, reporter: PlainReporter) -> None:
    found = compared(harmed, reporter)
    assert [(each.name, each.stage) for each in found.checked] == [
        ("prepared chats", "prepare"),
        ("adapter on base", "train"),
        ("merged", "merge"),
        ("f16 GGUF", "convert"),
        ("Q4_K_M", "quantize"),
        ("served f16", "modelfile"),
        ("served Q4_K_M", "modelfile"),
    ]
    by_name = {each.name: each for each in found.checked}
    assert found.held_out and found.chats == 6 and not found.not_kept
    assert found.base_loss is not None and found.tuned_loss is not None
    assert found.base_loss > found.tuned_loss + 1
    assert found.recorded_tuned_loss == pytest.approx(found.tuned_loss, abs=1e-3)
    assert found.recorded_base_loss == pytest.approx(found.base_loss, abs=1e-3)
    merged, f16 = by_name["merged"], by_name["f16 GGUF"]
    assert merged.kl_mean is not None and merged.kl_mean < 1e-5
    assert f16.kl_mean is not None and f16.kl_mean < 1e-4
    for each in found.checked:
        assert each.prompt_ids_equal.good == each.prompt_ids_equal.of
        assert each.prompt_ids_equal.of or each.name == "adapter on base"
        assert each.stops.good == each.stops.of
    assert by_name["served f16"].prompt_ids_equal.of == 7  # one more with the system prompt of the Modelfile
    assert merged.stops.of == 6 and by_name["served f16"].stops.of == 2
    assert [each.prompt for each in found.answers] == [
        "Here is a red boat. Which colour?",
        "Here is a blue boat. Which colour?",
    ]
    for answer in found.answers:
        assert answer.expected and answer.expected.startswith("Aye, the boat is")
        assert answer.tuned and answer.tuned.startswith("Aye") and answer.base and not answer.base.startswith("Aye")
    assert not list((harmed.output_dir / ".kolotune").glob("comparing*"))


# ---------------------------------------------------------------- the twelve faults


def run_of(config: Config) -> RunFolder:
    return RunFolder(config.output_dir)


def wrong_template(config: Config) -> None:
    file = run_of(config).merged_model / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert "<|im_end|>' + '\n'" in text
    file.write_text(text.replace("<|im_end|>' + '\n'", "<|im_end|>' + ' '"), encoding="utf-8")
    faults.make_again(config, "convert", "quantize")


def missing_stop(config: Config) -> None:
    for file in (run_of(config).modelfile(), run_of(config).modelfile("Q4_K_M")):
        text = file.read_text(encoding="utf-8")
        assert 'PARAMETER stop "<|im_end|>"\n' in text
        file.write_text(text.replace('PARAMETER stop "<|im_end|>"\n', ""), encoding="utf-8")


def doubled_bos(config: Config) -> None:
    for file in (run_of(config).gguf, run_of(config).quantized("Q4_K_M")):
        assert header.read(file).fields["tokenizer.ggml.add_bos_token"] is False
        header.set_flag(file, "tokenizer.ggml.add_bos_token", True)


def dropped_system_prompt(config: Config) -> None:
    for file in (run_of(config).modelfile(), run_of(config).modelfile("Q4_K_M")):
        text = file.read_text(encoding="utf-8")
        changed = re.sub(r'\{\{- if eq \$m\.Role "system" .*\n\{\{- else if', "{{- if", text)
        assert changed != text
        file.write_text(changed, encoding="utf-8")


def change_merged(config: Config, change: Callable[[str, Any, Any], Any]) -> None:
    """Puts ``change(name, base's weight, what merging added)`` in place of each merged matrix."""
    import torch
    from safetensors.torch import load_file

    base = load_file(Path(config.base_model) / "model.safetensors")

    def every(tensors: dict[str, Any]) -> None:
        for name, merged in tensors.items():
            weight = base[name].float()
            tensors[name] = change(name, weight, merged.float() - weight).to(torch.float16)

    faults.change_weights(run_of(config).merged_model, every)
    faults.make_again(config, "convert", "quantize")


def wrong_scaling(config: Config) -> None:
    change_merged(config, lambda name, weight, added: weight + 0.5 * added)


def transposed_adapter(config: Config) -> None:
    def change(name: str, weight: Any, added: Any) -> Any:
        square = added.ndim == 2 and added.shape[0] == added.shape[1]
        return weight + (added.T if square else added)

    change_merged(config, change)


def shuffled_vocabulary(config: Config) -> None:
    folder = run_of(config).root.parent / "shuffled"
    shutil.copytree(run_of(config).merged_model, folder)

    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary["Ġzebra"], vocabulary["Ġviolin"] = vocabulary["Ġviolin"], vocabulary["Ġzebra"]

    faults.change_json(folder / "tokenizer.json", swap)
    convert_folder(folder, run_of(config).gguf, run_of(config).log("convert"), PlainReporter())
    faults.make_again(config, "quantize")


def untied_embeddings(config: Config) -> None:
    folder = run_of(config).merged_model
    faults.change_json(folder / "config.json", lambda value: value.update(tie_word_embeddings=False))

    def head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, dims=1)

    faults.change_weights(folder, head)
    faults.make_again(config, "convert", "quantize")


def damaged_tensor(config: Config) -> None:
    dice = random.Random(3)

    def noise(data: Any) -> Any:
        flat = data.reshape(-1).view("uint8")
        flat[: len(flat) // 2] = bytearray(dice.randrange(100) for _ in range(len(flat) // 2))
        return data

    faults.change_tensors(run_of(config).quantized("Q4_K_M"), {"blk.1.ffn_down.weight": noise})


def another_converter(config: Config) -> None:
    """One that does not put the rows of q and k into the order that llama.cpp's rotation wants."""

    def as_in_the_hub(heads: int) -> Callable[[Any], Any]:
        def change(data: Any) -> Any:
            rows = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
            return rows.swapaxes(1, 2).reshape(data.shape)

        return change

    heads = {"attn_q": 4, "attn_k": 2}
    changes = {f"blk.{layer}.{name}.weight": as_in_the_hub(heads[name]) for layer in range(2) for name in heads}
    faults.change_tensors(run_of(config).gguf, changes)
    faults.make_again(config, "quantize")


def changed_gguf_template(config: Config) -> None:
    old = b"'<|im_start|>' + message['role']"
    faults.change_bytes(run_of(config).gguf, old, old.replace(b"<|im_start|>", b"<|im_strat|>"))


@pytest.mark.parametrize(
    ("plant", "stage", "what", "cause"),
    [
        pytest.param(wrong_template, "merge", "prompts get other tokens", "chat template", marks=pytest.mark.slow),
        (missing_stop, "modelfile", "no stop for '<|im_end|>'", "PARAMETER stop"),
        (doubled_bos, "convert", "prompts get other tokens", "BOS"),
        (dropped_system_prompt, "modelfile", "prompts get other tokens", "system"),
        (wrong_scaling, "merge", "mean KL", "scale"),
        (transposed_adapter, "merge", "mean KL", "orientation"),
        pytest.param(shuffled_vocabulary, "convert", "vocabulary's entry", "order", marks=pytest.mark.slow),
        pytest.param(untied_embeddings, "merge", "mean KL", "embedding", marks=pytest.mark.slow),
        (damaged_tensor, "quantize", "", "damaged"),
        (another_converter, "convert", "mean KL", "another version"),
        (changed_gguf_template, "convert", "prompts get other tokens", "chat template"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_named(
    harmed: Config, reporter: PlainReporter, plant: Callable[[Config], None], stage: str, what: str, cause: str
) -> None:
    plant(harmed)
    failure = compared(harmed, reporter).failure
    assert failure is not None, "the fault went through"
    assert failure.stage == stage and what in failure.what and cause in failure.likely_cause, failure


def test_another_base_of_the_same_shape_is_named(
    harmed: Config, learnt_bases: tuple[Path, Path], reporter: PlainReporter
) -> None:
    other = dataclasses.replace(harmed, base_model=str(learnt_bases[1]))
    faults.make_again(other, "merge", "convert", "quantize")
    failure = compared(other, reporter).failure
    assert failure is not None and failure.stage == "train"
    assert "base model's loss" in failure.what and "not the base model" in failure.likely_cause


# ---------------------------------------------------------------- and more


@pytest.mark.slow
def test_an_adapter_with_swapped_halves_is_named(harmed: Config, reporter: PlainReporter) -> None:
    """Everything after it was made from it, and agrees with it."""

    def swap(tensors: dict[str, Any]) -> None:
        for name in [each for each in tensors if "lora_A" in each]:
            other = name.replace("lora_A", "lora_B")
            a, b = tensors[name], tensors[other]
            if a.shape[1] == b.shape[0]:
                tensors[name], tensors[other] = b.T.contiguous(), a.T.contiguous()

    faults.change_weights(run_of(harmed).adapter, swap)
    faults.make_again(harmed, "merge", "convert", "quantize")
    failure = compared(harmed, reporter).failure
    assert failure is not None and failure.stage == "train" and "not the adapter" in failure.likely_cause


def unlearnt_end(config: Config) -> None:
    """The labels no longer hold the end token."""
    from safetensors.numpy import load_file, save_file

    file = run_of(config).prepared / "held_out.safetensors"
    tokens = load_file(file)
    tokens["labelled"][tokens["ids"] == 2] = 0
    save_file(tokens, file)


def system_line_dropped(config: Config) -> None:
    file = run_of(config).modelfile("Q4_K_M")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(each for each in lines if not each.startswith("SYSTEM")), encoding="utf-8")


def head_is_not_there(config: Config) -> None:
    faults.change_json(
        run_of(config).merged_model / "config.json", lambda value: value.update(tie_word_embeddings=False)
    )


def no_gguf_at_all(config: Config) -> None:
    run_of(config).quantized("Q4_K_M").write_bytes(run_of(config).quantized("Q4_K_M").read_bytes()[:100_000])


def template_in_a_language_unknown(config: Config) -> None:
    file = run_of(config).modelfile()
    file.write_text(file.read_text(encoding="utf-8").replace("{{- range", '{{- template "x" }}{{ range', 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "stage", "what"),
    [
        (unlearnt_end, "prepare", "not trained to end with '<|im_end|>'"),
        (system_line_dropped, "modelfile", "SYSTEM"),
        (head_is_not_there, "merge", "lack lm_head.weight"),
        (no_gguf_at_all, "quantize", "can't load it"),
        (template_in_a_language_unknown, "modelfile", "template is not known"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_faults_are_named(
    harmed: Config, reporter: PlainReporter, plant: Callable[[Config], None], stage: str, what: str
) -> None:
    plant(harmed)
    failure = compared(harmed, reporter).failure
    assert failure is not None and failure.stage == stage and what in failure.what, failure


def test_what_a_lean_run_does_not_keep_is_said(harmed: Config, reporter: PlainReporter) -> None:
    run = run_of(harmed)
    shutil.rmtree(run.merged_model)
    for path in (run.gguf, run.modelfile(), run.record("merge"), run.record("convert")):
        path.unlink()
    compare.run(faults.context_of(harmed), reporter)
    found = Comparison.read(run.comparison)
    assert found.not_kept == ("merged", "f16 GGUF")
    assert [each.name for each in found.checked] == ["prepared chats", "adapter on base", "Q4_K_M", "served Q4_K_M"]
    assert found.checked[2].against == "adapter on base" and found.passed


def test_a_run_without_chats_of_its_own_is_refused(harmed: Config, reporter: PlainReporter) -> None:
    shutil.rmtree(run_of(harmed).prepared)
    with pytest.raises(KolotuneError, match="no chats and adapter of its own"):
        compare.run(faults.context_of(harmed), reporter)
