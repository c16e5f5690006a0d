"""Training resumes from the complete checkpoint with the highest number; files of two are never mixed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import TrainingFolder

from kolotune.engines.torchtune import recipe_checkpoints
from kolotune.engines.torchtune.inside.kolotune_recipe import checkpoint as recipe
from kolotune.engines.torchtune.inside.kolotune_recipe import checkpoint_files
from kolotune.foundation.errors import TrainingError

FILES = ("adapter_model.safetensors", "state.safetensors", "checkpoint.txt")


@pytest.fixture
def job(tmp_path: Path) -> Any:
    return TrainingFolder(tmp_path).job(epochs=20, resume=True)


def write(job: Any, epoch: int, **identity: Any) -> Path:
    state = recipe.RecipeState(
        epoch=epoch,
        step=epoch * 5,
        adapter={"layers.0.attn.q_proj.lora_a.weight": torch.full((2, 3), float(epoch))},
        optimizer={"layers.0.attn.q_proj.lora_a.weight": {"step": torch.tensor(epoch * 5.0)}},
        random=recipe.random_state(),
        halvings=[0, 5],
    )
    peft = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((2, 3), float(epoch))}
    recipe.save(Path(job.checkpoints), state, peft, {**job.identity(), **identity})
    return Path(job.checkpoints) / f"epoch-{epoch:06d}"


def epoch_of(found: recipe_checkpoints.RecipeCheckpoint | None) -> int | None:
    return found and found.epoch


def test_a_checkpoint_survives_a_round_trip(job: Any) -> None:
    folder = write(job, 3)
    found = recipe_checkpoints.newest(job)
    assert found == recipe_checkpoints.RecipeCheckpoint(folder, 3, 15, [0, 5])
    (tensor,) = found.adapter().values()
    assert torch.equal(tensor, torch.full((2, 3), 3.0))
    state = recipe.load(folder)
    assert (state.epoch, state.step) == (3, 15)
    (moments,) = state.optimizer.values()
    assert moments["step"] == 15 and torch.equal(state.random["cpu"], torch.get_rng_state())


def test_a_new_job_has_no_checkpoint(job: Any) -> None:
    assert recipe_checkpoints.newest(job) is None


def test_the_newest_is_the_one_with_the_highest_number(job: Any) -> None:
    for epoch in (2, 9, 10, 1):
        write(job, epoch)
    for number, path in enumerate(sorted(Path(job.checkpoints).iterdir(), reverse=True)):
        os.utime(path, (number, number))
    assert epoch_of(recipe_checkpoints.newest(job)) == 10


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_skipped(job: Any, file: str, damage: str) -> None:
    write(job, 1)
    path = write(job, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert epoch_of(recipe_checkpoints.newest(job)) == 1


@pytest.mark.parametrize("file", FILES)
def test_files_of_two_epochs_are_never_mixed(job: Any, file: str) -> None:
    older, newer = write(job, 1), write(job, 2)
    shutil.copyfile(older / file, newer / file)
    assert epoch_of(recipe_checkpoints.newest(job)) == 1


def test_a_checkpoint_under_another_number_is_skipped(job: Any) -> None:
    write(job, 1).rename(Path(job.checkpoints) / "epoch-000007")
    assert recipe_checkpoints.newest(job) is None


def test_killed_at_every_step_of_writing(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the writer is killed, the older checkpoint is still found, and it is complete."""
    write(job, 1)

    class Killed(BaseException):
        pass

    stops = 0
    for limit in range(1, 100):
        left = limit

        def step(call: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return call(*arguments, **options)

            return counted

        with monkeypatch.context() as patched:
            patched.setattr(recipe, "save_file", step(recipe.save_file))
            patched.setattr(checkpoint_files, "hash_of", step(checkpoint_files.hash_of))
            patched.setattr(os, "fsync", step(os.fsync))
            patched.setattr(Path, "write_text", step(Path.write_text))
            patched.setattr(Path, "rename", step(Path.rename))
            try:
                write(job, 2)
            except Killed:
                stops += 1
                found = recipe_checkpoints.newest(job)
                renamed = (Path(job.checkpoints) / "epoch-000002").exists()
                assert epoch_of(found) == (2 if renamed else 1)
                continue
        break
    assert stops >= 8 and epoch_of(recipe_checkpoints.newest(job)) == 2


def test_other_settings_are_refused(job: Any) -> None:
    write(job, 1, lora_rank=99, seed=98)
    with pytest.raises(TrainingError, match="lora_rank, seed"):
        recipe_checkpoints.newest(job)


def test_more_epochs_are_not_other_settings(job: Any) -> None:
    write(job, 1, epochs=99)
    assert epoch_of(recipe_checkpoints.newest(job)) == 1


def test_old_checkpoints_are_removed_once_the_newest_is_whole(job: Any) -> None:
    for epoch in (1, 2, 3):
        write(job, epoch)
    (write(job, 4) / FILES[0]).write_bytes(b"")
    recipe_checkpoints.prune(job)
    assert len(list(Path(job.checkpoints).iterdir())) == 4
    write(job, 4)
    recipe_checkpoints.prune(job)
    assert sorted(path.name for path in Path(job.checkpoints).iterdir()) == ["epoch-000003", "epoch-000004"]


def test_other_folders_are_left_alone(job: Any) -> None:
    write(job, 1)
    for name in ("epoch-last", "step-00000005"):
        (Path(job.checkpoints) / name).mkdir()
    assert epoch_of(recipe_checkpoints.newest(job)) == 1
    recipe_checkpoints.prune(job)
    assert {path.name for path in Path(job.checkpoints).iterdir()} == {"epoch-000001", "epoch-last", "step-00000005"}
