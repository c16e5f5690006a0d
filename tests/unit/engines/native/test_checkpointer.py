"""A checkpoint is complete or invisible; training resumes from the newest complete one of the same job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from kolotune.engines.job import TrainJob
from kolotune.engines.native import checkpointer
from kolotune.engines.native.checkpointer import TENSORS, TrainingState
from kolotune.foundation.errors import TrainingError


@pytest.fixture
def job(make_training: Callable[..., Any]) -> TrainJob:
    new_job: TrainJob = make_training().job()
    return new_job


def _save(job: TrainJob, *steps: int) -> None:
    for step in steps:
        checkpointer.save(
            job, TrainingState(step, 1.5, 2, {"x": torch.full((3, 4), float(step)), "best.x": torch.ones(2)})
        )


def _folder(job: TrainJob, step: int) -> Path:
    return Path(job.checkpoints) / f"step-{step:08d}"


def test_a_checkpoint_survives_a_round_trip(job: TrainJob) -> None:
    _save(job, 7)
    state = checkpointer.newest(job)
    assert state is not None
    assert (state.step, state.best_loss, state.evaluations_since_best) == (7, 1.5, 2)
    assert torch.equal(state.tensors["x"], torch.full((3, 4), 7.0))
    assert list(state.tensors_under("best.")) == ["x"]


@pytest.fixture
def process_group() -> Iterator[None]:
    """Start a process group of one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("distributed", [False, True])
def test_it_is_a_pytorch_distributed_checkpoint(
    distributed: bool, job: TrainJob, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    if distributed:
        request.getfixturevalue("process_group")
    tensors = {"a.weight": torch.rand(3, 4), "optimizer.step.": torch.tensor(3.0), "rng.cpu": torch.get_rng_state()}
    tensors |= {"b": torch.rand(2, 2).bfloat16()}
    checkpointer.save(job, TrainingState(1, tensors=tensors))
    assert not [each for each in recwarn if "distributed" in str(each.message)], (
        "PyTorch's warning must not reach the user"
    )
    assert (_folder(job, 1) / "model.safetensors.index.json").is_file() == distributed, "PyTorch's writer adds an index"
    state = checkpointer.newest(job)
    read = {name: torch.zeros_like(each) for name, each in tensors.items()}
    state_dict_loader.load(read, storage_reader=HuggingFaceStorageReader(str(_folder(job, 1))), no_dist=True)
    assert state is not None and state.tensors.keys() == tensors.keys()
    assert all(torch.equal(each[name], tensors[name]) for each in (read, state.tensors) for name in tensors)


def test_write_errors_are_the_same_with_several_processes(process_group: None, tmp_path: Path) -> None:
    (tmp_path / TENSORS).mkdir()
    with pytest.raises(IsADirectoryError):
        checkpointer._write({"x": torch.ones(2)}, tmp_path)


def test_a_new_job_has_no_checkpoint(job: TrainJob) -> None:
    assert checkpointer.newest(job) is None


def test_the_two_with_the_highest_steps_are_kept(job: TrainJob) -> None:
    _save(job, 9, 100, 20, 11)
    assert sorted(each.name for each in Path(job.checkpoints).iterdir()) == ["step-00000020", "step-00000100"]
    state = checkpointer.newest(job)
    assert state is not None and state.step == 100


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _copy(folder: Path, *names: str) -> None:
    """Replace these files with those of the checkpoint of step 2."""
    other = folder.with_name("step-00000002")
    for name in names:
        (folder / name).write_bytes((other / name).read_bytes())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors cut": lambda folder: _cut(folder / TENSORS),
    "one bit of the tensors": lambda folder: _flip(folder / TENSORS),
    "tensors missing": lambda folder: (folder / TENSORS).unlink(),
    "tensors empty": lambda folder: (folder / TENSORS).write_bytes(b""),
    "facts cut": lambda folder: _cut(folder / "state.json"),
    "facts missing": lambda folder: (folder / "state.json").unlink(),
    "facts no mapping": lambda folder: (folder / "state.json").write_text("[]"),
    "facts of another step": lambda folder: _copy(folder, "state.json"),
    "tensors of another step": lambda folder: _copy(folder, TENSORS),
    "another step in its place": lambda folder: _copy(folder, "state.json", TENSORS),
    "facts of nothing": lambda folder: (folder / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(job: TrainJob, damage: str) -> None:
    _save(job, 2)
    elsewhere = _folder(job, 2).rename(Path(job.checkpoints).with_name("kept"))
    _save(job, 4, 8)
    elsewhere.rename(_folder(job, 2))
    DAMAGES[damage](_folder(job, 8))
    state = checkpointer.newest(job)
    assert state is not None and state.step == 4
    DAMAGES[damage](_folder(job, 4))
    state = checkpointer.newest(job)
    assert state is not None and state.step == 2
    DAMAGES["facts cut"](_folder(job, 2))
    assert checkpointer.newest(job) is None


def test_a_partial_checkpoint_is_ignored(job: TrainJob) -> None:
    _save(job, 4)
    unfinished = Path(job.checkpoints) / ".step-00000008.partial"
    unfinished.mkdir()
    (unfinished / TENSORS).write_bytes(b"half")
    state = checkpointer.newest(job)
    assert state is not None and state.step == 4


CHANGES: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 3, "gradient_accumulation": 2, "seed": 8, "lora_rank": 8, "lora_alpha": 9.0,
    "lora_dropout": 0.2, "dtype": "bf16", "scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 0.5,
    "target_modules": ["q_proj"], "base_sha256": "other", "data_sha256": "other", "warmup_steps": 3,
    "load_in_4bit": True, "use_rslora": True, "use_dora": True, "init_lora_weights": "pissa",
    "rank_pattern": ["q_proj=2"], "new_tokens": [3], "alpha_pattern": ["q_proj=2"],
    "lora_plus_ratio": 2.0, "neftune_noise_alpha": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_name(job: TrainJob, name: str) -> None:
    _save(job, 4)
    with pytest.raises(TrainingError, match=rf" {name}$") as caught:
        checkpointer.newest(dataclasses.replace(job, **{name: CHANGES[name]}))
    assert "--use-checkpoint" in caught.value.hint


@pytest.mark.parametrize(
    "option",
    [{"use_rslora": True}, {"use_dora": True}, {"lora_plus_ratio": 2.0}, {"target_parameters": ["all-experts"]}],
)
def test_an_option_that_was_on_is_refused_when_it_is_off(job: TrainJob, option: dict[str, Any]) -> None:
    _save(dataclasses.replace(job, **option), 4)
    with pytest.raises(TrainingError, match=rf" {next(iter(option))}$"):
        checkpointer.newest(job)


def test_options_that_are_off_fit_checkpoints_of_earlier_versions(job: TrainJob) -> None:
    younger = (
        "use_rslora use_dora init_lora_weights rank_pattern alpha_pattern lora_plus_ratio neftune_noise_alpha "
        "target_parameters new_tokens"
    )
    assert not {*younger.split()} & set(job.identity())


def test_every_changed_setting_is_named(job: TrainJob) -> None:
    _save(job, 4)
    with pytest.raises(TrainingError, match="lora_rank, seed"):
        checkpointer.newest(dataclasses.replace(job, seed=1, lora_rank=1))


@pytest.mark.parametrize(
    "more",
    [{"epochs": 9}, {"early_stopping": 3}, {"checkpoint_steps": 1}, {"resume": True}, {"base_model": "moved"},
     {"adapter": "a", "metrics": "m", "data": "d"}],
)  # fmt: skip
def test_settings_that_may_change(job: TrainJob, more: dict[str, Any]) -> None:
    _save(job, 4)
    assert checkpointer.newest(dataclasses.replace(job, **more)) is not None


def test_a_job_survives_a_round_trip(job: TrainJob, tmp_path: Path) -> None:
    job.write(tmp_path / "job.json")
    assert TrainJob.read(tmp_path / "job.json") == job
    facts = json.loads((tmp_path / "job.json").read_text(encoding="utf-8"))
    for text in ("{", "[]", json.dumps({**facts, "unknown": 1}), json.dumps({"epochs": 1})):
        (tmp_path / "job.json").write_text(text, encoding="utf-8")
        with pytest.raises(TrainingError, match=r"job\.json"):
            TrainJob.read(tmp_path / "job.json")


def test_clear_removes_all(job: TrainJob) -> None:
    _save(job, 1, 2)
    checkpointer.clear(job)
    assert checkpointer.newest(job) is None and not Path(job.checkpoints).exists()
    checkpointer.clear(job)
