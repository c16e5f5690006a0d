"""The gate: an intact run passes, and for each planted fault the right stage fails, although all hashes agree.

Measuring runs in this process, which takes a tenth of the time; `test_command.py` measures in child processes.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import faults

from kolotune.fidelity import judge
from kolotune.fidelity.comparison import Comparison, Count
from kolotune.fidelity.defects import DefectKind
from kolotune.fidelity.evidence import Evidence
from kolotune.fidelity.judge import FirstFailure, JudgedCheck
from kolotune.fidelity.likely_cause import Cause
from kolotune.foundation.config import Config
from kolotune.foundation.errors import FidelityError, KolotuneError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import header
from kolotune.gguf.convert import convert_folder
from kolotune.pipeline.stages import STAGES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.reasons import find_reasons
from kolotune.stages import compare

pytestmark = pytest.mark.usefixtures("measured_here", "one_thread")


@pytest.fixture
def run_config(learned_run: Config, tmp_path: Path) -> Config:
    """A copy of the finished run, to plant faults in."""
    shutil.copytree(learned_run.output_dir, tmp_path / "run")
    return dataclasses.replace(learned_run, output_dir=tmp_path / "run")


@pytest.fixture(autouse=True)
def failures(monkeypatch: pytest.MonkeyPatch) -> list[FirstFailure | None]:
    """The failure of each comparison of a test, with the kinds of its defects and its cause."""
    seen: list[FirstFailure | None] = []
    original = judge.first_failure

    def spy(checks: Sequence[JudgedCheck], evidence: Evidence) -> FirstFailure | None:
        seen.append(original(checks, evidence))
        return seen[-1]

    monkeypatch.setattr(judge, "first_failure", spy)
    return seen


def compare_run(config: Config, reporter: PlainReporter) -> Comparison:
    """Compare a run; before that, every stage looks done."""
    faults.seal(config)
    context = faults.context_of(config)
    for stage in STAGES:
        if stage is not compare:
            assert find_reasons(stage, context) == []
    try:
        compare.run(context, reporter)
    except FidelityError as error:
        comparison = Comparison.read(context.run.comparison)
        assert comparison.failure is not None and error.cause.startswith(f"{comparison.failure.stage}: ")
        assert comparison.failure.likely_cause in error.hint
        return comparison
    comparison = Comparison.read(context.run.comparison)
    assert comparison.passed and all(check.passed for check in comparison.checked)
    return comparison


def assert_fails(
    failures: list[FirstFailure | None], stage: str, kind: DefectKind | None, causes: set[Cause] | None = None
) -> None:
    """Check where the last comparison fails first, with a defect of which kind and which cause; None: any."""
    failure = failures[-1]
    assert failure is not None, "the fault was not noticed"
    assert failure.judged.check.stage == stage
    assert kind in (None, failure.judged.defects[0].kind)
    assert causes is None or failure.cause in causes


def test_an_intact_run_passes(run_config: Config, reporter: PlainReporter) -> None:
    comparison = compare_run(run_config, reporter)
    assert [(check.name, check.stage) for check in comparison.checked] == [
        ("prepared chats", "prepare"),
        ("adapter on base", "train"),
        ("merged", "merge"),
        ("f16 GGUF", "convert"),
        ("Q4_K_M", "quantize"),
        ("served f16", "modelfile"),
        ("served Q4_K_M", "modelfile"),
    ]
    by_name = {check.name: check for check in comparison.checked}
    assert comparison.held_out and comparison.chats == 6 and not comparison.not_kept
    assert comparison.base_loss is not None and comparison.tuned_loss is not None
    assert comparison.base_loss > comparison.tuned_loss + 1
    assert comparison.recorded_tuned_loss == pytest.approx(comparison.tuned_loss, abs=1e-3)
    assert comparison.recorded_base_loss == pytest.approx(comparison.base_loss, abs=1e-3)
    merged, f16 = by_name["merged"], by_name["f16 GGUF"]
    assert merged.kl_mean is not None and merged.kl_mean < 1e-5
    assert f16.kl_mean is not None and f16.kl_mean < 1e-4
    q4 = by_name["Q4_K_M"]
    assert q4.gain_kept == pytest.approx(1, abs=0.1) and q4.gain_kept_error is not None
    assert f16.gain_kept == pytest.approx(1, abs=1e-3)
    matrices = comparison.quantizations[0].matrices
    assert len(matrices) == 2 * 7 and all(abs(matrix.change_kept - 1) < 0.2 for matrix in matrices)
    for check in comparison.checked:
        assert check.prompt_ids_equal.good == check.prompt_ids_equal.of
        assert check.prompt_ids_equal.of or check.name == "adapter on base"
        assert check.stops.good == check.stops.of
    # Of the chats, one with the system prompt of the Modelfile, and of a chat with and one without a system turn.
    assert by_name["served f16"].prompt_ids_equal.of == 6 + 1 + 2
    assert merged.stops.of == 6 and by_name["served f16"].stops.of == 2
    assert [answer.prompt for answer in comparison.answers] == [
        "Here is a red boat. Which colour?",
        "Here is a blue boat. Which colour?",
    ]
    for answer in comparison.answers:
        assert answer.expected and answer.expected.startswith("Aye, the boat is")
        assert answer.tuned and answer.tuned.startswith("Aye") and answer.base and not answer.base.startswith("Aye")
    assert not list((run_config.output_dir / ".kolotune").glob("comparing*"))
    assert [(path.name, path.path, path.is_ollamas) for path in comparison.paths] == [
        ("f16 GGUF", "jinja", False),
        ("f16 GGUF", "template", True),
        ("Q4_K_M", "jinja", False),
        ("Q4_K_M", "template", True),
    ]
    for path in comparison.paths:
        assert path.prompt_ids_equal == Count(7, 7)
        assert path.traits_equal.good == path.traits_equal.of > 4
        assert path.traits["system"] == "equal" and path.traits.get("tools") in ("training-refuses", None)


# ---------------------------------------------------------------- planted faults


def run_of(config: Config) -> RunFolder:
    return RunFolder(config.output_dir)


def wrong_template(config: Config) -> None:
    file = run_of(config).merged_model / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert "<|im_end|>' + '\n'" in text
    file.write_text(text.replace("<|im_end|>' + '\n'", "<|im_end|>' + ' '"), encoding="utf-8")
    faults.rerun_stages(config, "convert", "quantize")


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
    """Replace each merged matrix by ``change(name, the base's weight, what merging added)``."""
    import torch
    from safetensors.torch import load_file

    base = load_file(Path(config.base_model) / "model.safetensors")

    def every(tensors: dict[str, Any]) -> None:
        for name, merged in tensors.items():
            weight = base[name].float()
            tensors[name] = change(name, weight, merged.float() - weight).to(torch.float16)

    faults.change_weights(run_of(config).merged_model, every)
    faults.rerun_stages(config, "convert", "quantize")


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
    faults.rerun_stages(config, "quantize")


def untied_embeddings(config: Config) -> None:
    folder = run_of(config).merged_model
    faults.change_json(folder / "config.json", lambda value: value.update(tie_word_embeddings=False))

    def head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, dims=1)

    faults.change_weights(folder, head)
    faults.rerun_stages(config, "convert", "quantize")


def damaged_tensor(config: Config) -> None:
    dice = random.Random(3)

    def noise(data: Any) -> Any:
        flat = data.reshape(-1).view("uint8")
        flat[: len(flat) // 2] = bytearray(dice.randrange(100) for _ in range(len(flat) // 2))
        return data

    faults.change_tensors(run_of(config).quantized("Q4_K_M"), {"blk.1.ffn_down.weight": noise})


def rounded_to_the_base(config: Config) -> None:
    """What an erasing type does where the base lies on its grid: the quantized file is that of the base."""
    run = run_of(config)
    kept = {path: path.read_bytes() for path in (*run.merged_model.iterdir(), run.gguf)}
    change_merged(config, lambda name, weight, added: weight - added)
    for path, content in kept.items():
        path.write_bytes(content)


def another_converter(config: Config) -> None:
    """Convert without reordering the rows of q and k for llama.cpp's rotary embedding."""

    def as_in_the_hub(heads: int) -> Callable[[Any], Any]:
        def change(data: Any) -> Any:
            rows = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
            return rows.swapaxes(1, 2).reshape(data.shape)

        return change

    heads = {"attn_q": 4, "attn_k": 2}
    changes = {f"blk.{layer}.{name}.weight": as_in_the_hub(heads[name]) for layer in range(2) for name in heads}
    faults.change_tensors(run_of(config).gguf, changes)
    faults.rerun_stages(config, "quantize")


def changed_gguf_template(config: Config) -> None:
    old = b"'<|im_start|>' + message['role']"
    faults.change_bytes(run_of(config).gguf, old, old.replace(b"<|im_start|>", b"<|im_strat|>"))


def change_later_turns(config: Config) -> None:
    """Change what the GGUFs' template writes from the third turn on; the compared chats have no exchange before."""
    old = (run_of(config).tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    new = old
    for text, shorter in (
        ("messages[0]['role'] != ", "messages[0].role!="),
        ("' + message['role'] + '", "'+message.role+'"),
        ("message['content'] + '<|im_end|>' + '", "message.content+'<|im_end|>'+('!' if loop.index>2 else '')+'"),
        ("{% ", "{%"),
        (" %}", "%}"),
        ("{{ ", "{{"),
        (" }}", "}}"),
    ):
        assert text in new
        new = new.replace(text, shorter)
    new = new.replace("{%endfor", "{%" + " " * (len(old) - len(new)) + "endfor")
    for file in (run_of(config).gguf, run_of(config).quantized("Q4_K_M")):
        faults.change_bytes(file, old.encode(), new.encode())


@pytest.mark.parametrize(
    ("plant", "stage", "kind", "causes"),
    [
        pytest.param(wrong_template, "merge", DefectKind.PROMPTS_DIFFER, {Cause.CHAT_TEMPLATE}, marks=pytest.mark.slow),
        (missing_stop, "modelfile", DefectKind.STOP_MISSING, {Cause.STOP_MISSING}),
        # On the GGUF's own template, llama.cpp's server takes the BOS off the text that it adds as a token.
        (doubled_bos, "modelfile", DefectKind.PROMPTS_DIFFER, {Cause.TEMPLATE_DIFFERS}),
        (dropped_system_prompt, "modelfile", DefectKind.PROMPTS_DIFFER, {Cause.TEMPLATE_DIFFERS}),
        (wrong_scaling, "merge", DefectKind.OVER_BOUND, {Cause.SCALE_TOO_SMALL, Cause.WRONG_SCALE}),
        (transposed_adapter, "merge", DefectKind.OVER_BOUND, {Cause.WRONG_SCALE}),
        pytest.param(
            shuffled_vocabulary,
            "convert",
            DefectKind.VOCABULARY_MOVED,
            {Cause.VOCABULARY_ORDER},
            marks=pytest.mark.slow,
        ),
        pytest.param(untied_embeddings, "merge", DefectKind.OVER_BOUND, {Cause.HEAD_UNTIED}, marks=pytest.mark.slow),
        (damaged_tensor, "quantize", None, {Cause.DAMAGED_OR_TOO_COARSE}),
        (rounded_to_the_base, "quantize", DefectKind.GAIN_LOST_HERE, {Cause.ROUNDED_BACK}),
        (another_converter, "convert", DefectKind.OVER_BOUND, {Cause.CONVERTER}),
        (changed_gguf_template, "convert", DefectKind.PROMPTS_DIFFER, {Cause.CHAT_TEMPLATE}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found(
    run_config: Config,
    reporter: PlainReporter,
    failures: list[FirstFailure | None],
    plant: Callable[[Config], None],
    stage: str,
    kind: DefectKind | None,
    causes: set[Cause],
) -> None:
    plant(run_config)
    compare_run(run_config, reporter)
    assert_fails(failures, stage, kind, causes)


def test_what_the_chats_do_not_have_is_noted(run_config: Config, reporter: PlainReporter) -> None:
    change_later_turns(run_config)
    comparison = compare_run(run_config, reporter)
    assert comparison.passed, "the chats are served as they were trained"
    traits = {path.path: path.traits["turns"] for path in comparison.paths}
    assert traits == {"jinja": "different", "template": "equal"}
    (note,) = [note for note in comparison.notes if "several exchanges" in note]
    assert "differently" in note


@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_the_chats_have_fails_the_gate(
    run_config: Config, reporter: PlainReporter, failures: list[FirstFailure | None], is_recorded: bool
) -> None:
    """Also where none of the few compared chats has it; unless an earlier version did not record what they have."""
    change_later_turns(run_config)
    record = run_of(run_config).record("prepare")
    facts = {"traits": ["question", "turns"]} if is_recorded else {}
    faults.change_json(record, lambda value: (value.update(facts=facts), value.pop("sha256")))
    comparison = compare_run(run_config, reporter)
    assert comparison.passed is not is_recorded
    if is_recorded:
        assert_fails(failures, "convert", DefectKind.PROMPTS_DIFFER, {Cause.CHAT_TEMPLATE})
        assert comparison.failure is not None and "<|im_end|>!" in comparison.failure.what


def test_a_different_base_of_the_same_shape_is_found(
    run_config: Config, learned_bases: tuple[Path, Path], reporter: PlainReporter, failures: list[FirstFailure | None]
) -> None:
    other = dataclasses.replace(run_config, base_model=str(learned_bases[1]))
    faults.rerun_stages(other, "merge", "convert", "quantize")
    compare_run(other, reporter)
    assert_fails(failures, "train", DefectKind.LOSS_DIFFERS, {Cause.OTHER_BASE})


# ---------------------------------------------------------------- more faults


@pytest.mark.slow
def test_an_adapter_with_swapped_matrices_is_found(
    run_config: Config, reporter: PlainReporter, failures: list[FirstFailure | None]
) -> None:
    """All later artifacts were made from it, and agree with it."""

    def swap(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            a, b = tensors[name], tensors[other]
            if a.shape[1] == b.shape[0]:
                tensors[name], tensors[other] = b.T.contiguous(), a.T.contiguous()

    faults.change_weights(run_of(run_config).adapter, swap)
    faults.rerun_stages(run_config, "merge", "convert", "quantize")
    compare_run(run_config, reporter)
    assert_fails(failures, "train", DefectKind.LOSS_DIFFERS, {Cause.OTHER_ADAPTER})


def end_not_trained(config: Config) -> None:
    """Remove the end token from the loss mask."""
    from safetensors.numpy import load_file, save_file

    file = run_of(config).prepared / "held_out.safetensors"
    tokens = load_file(file)
    tokens["labelled"][tokens["ids"] == 2] = 0
    save_file(tokens, file)


def dropped_system_line(config: Config) -> None:
    file = run_of(config).modelfile("Q4_K_M")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("SYSTEM")), encoding="utf-8")


def head_missing(config: Config) -> None:
    faults.change_json(
        run_of(config).merged_model / "config.json", lambda value: value.update(tie_word_embeddings=False)
    )


def truncated_gguf(config: Config) -> None:
    run_of(config).quantized("Q4_K_M").write_bytes(run_of(config).quantized("Q4_K_M").read_bytes()[:100_000])


def template_with_unknown_action(config: Config) -> None:
    file = run_of(config).modelfile()
    file.write_text(file.read_text(encoding="utf-8").replace("{{- range", '{{- template "x" }}{{ range', 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "stage", "kind", "fact"),
    [
        (end_not_trained, "prepare", DefectKind.END_NOT_TRAINED, "<|im_end|>"),
        (dropped_system_line, "modelfile", DefectKind.SYSTEM_DIFFERS, ""),
        (head_missing, "merge", DefectKind.WEIGHTS_MISSING, "lm_head.weight"),
        (truncated_gguf, "quantize", DefectKind.NOT_MEASURABLE, "MergedQ4_K_M.gguf"),
        (template_with_unknown_action, "modelfile", DefectKind.PROMPTS_DIFFER, "TEMPLATE"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_faults_are_found(
    run_config: Config,
    reporter: PlainReporter,
    failures: list[FirstFailure | None],
    plant: Callable[[Config], None],
    stage: str,
    kind: DefectKind,
    fact: str,
) -> None:
    plant(run_config)
    failure = compare_run(run_config, reporter).failure
    assert_fails(failures, stage, kind)
    assert failure is not None and fact in failure.what


def test_what_a_lean_run_does_not_keep_is_listed(run_config: Config, reporter: PlainReporter) -> None:
    run = run_of(run_config)
    shutil.rmtree(run.merged_model)
    for path in (run.gguf, run.modelfile(), run.record("merge"), run.record("convert")):
        path.unlink()
    compare.run(faults.context_of(run_config), reporter)
    comparison = Comparison.read(run.comparison)
    assert comparison.not_kept == ("merged", "f16 GGUF")
    assert [check.name for check in comparison.checked] == [
        "prepared chats",
        "adapter on base",
        "Q4_K_M",
        "served Q4_K_M",
    ]
    assert comparison.checked[2].against == "adapter on base" and comparison.passed


def test_a_run_without_prepared_chats_is_refused(run_config: Config, reporter: PlainReporter) -> None:
    shutil.rmtree(run_of(run_config).prepared)
    with pytest.raises(KolotuneError, match="has no chats and adapter of its own"):
        compare.run(faults.context_of(run_config), reporter)
