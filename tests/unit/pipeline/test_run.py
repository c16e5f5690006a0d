"""The whole road with a tiny model: what runs again and why, who holds a folder, and how a run is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.runs import STAGES_WITHOUT_COMPARE, config_of, partials, states

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError, RunFolderError
from kolotune.foundation.files import Hasher
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline import choices
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import StageState, read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import MarkState, write_mark
from kolotune.run_folder.reasons import Reason, ReasonKind
from kolotune.run_folder.records import read_record


def to_run(run: RunFolder, **changes: Any) -> dict[str, list[Reason]]:
    """Return the stages that have reasons to run; without those that only wait for a stage before them."""
    found = read_status(run, config_of(run, **changes) if changes else None)
    return {each.name: list(each.reasons) for each in found if each.reasons}


def option(name: str, before: object, after: object) -> Reason:
    return Reason(ReasonKind.OPTION_CHANGED, name, before, after)


def changed(label: str) -> Reason:
    return Reason(ReasonKind.INPUT_CHANGED, label)


def altered(name: str) -> Reason:
    return Reason(ReasonKind.OUTPUT_ALTERED, name)


def missing(name: str) -> Reason:
    return Reason(ReasonKind.OUTPUT_MISSING, name)


def hashes(run: RunFolder) -> dict[str, str]:
    hasher = Hasher()
    paths = [*run.root.glob("*.gguf"), *run.root.glob("Modelfile*"), run.adapter, run.merged_model, run.prepared]
    return {path.name: hasher.of(path) for path in paths}


def test_a_finished_run_has_everything_and_says_so(finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    assert set(states(run).values()) == {"done"}
    for path in (run.adapter, run.merged_model, run.gguf, run.quantized("Q4_K_M"), run.modelfile()):
        assert path.exists()
    assert "FROM ./MergedQ4_K_M.gguf" in run.modelfile("Q4_K_M").read_text()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [each["step"] for each in lines if "loss" in each] == [1]
    assert partials(run) == []
    for stage in set(STAGES_WITHOUT_COMPARE):
        assert read_record(run, stage) is not None


def test_run_again_does_nothing(run_copy: RunFolder, capsys: Any, reporter: PlainReporter) -> None:
    before = hashes(run_copy)
    run_pipeline(config_of(run_copy), reporter)
    printed = capsys.readouterr().out
    assert printed.count("done before, nothing it depends on has changed") == 6
    assert "..." not in printed
    assert hashes(run_copy) == before


def test_times_and_the_clock_play_no_part(run_copy: RunFolder, monkeypatch: Any) -> None:
    for when in (0, 4_000_000_000):
        for path in [*run_copy.root.rglob("*"), run_copy.root.parent / "chats.jsonl"]:
            os.utime(path, (when, when))
        assert to_run(run_copy) == {}
    real = time.time
    for shift in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        assert to_run(run_copy) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_seq_length": 99}, {"prepare": [option("max_seq_length", 2048, 99)]}),
        ({"eval_split": 0.5}, {"prepare": [option("eval_split", 0.05, 0.5)]}),
        ({"skip_bad": True}, {"prepare": [option("skip_bad", False, True)]}),
        ({"epochs": 2}, {"train": [option("epochs", 1, 2)]}),
        ({"learning_rate": 0}, {"train": [option("learning_rate", 0.0002, 0.0)]}),
        ({"target_modules": "q_proj"}, {"train": [option("target_modules", ["all-linear"], ["q_proj"])]}),
        ({"merge_dtype": "bf16"}, {"merge": [option("merge_dtype", "f16", "bf16")]}),
        (
            {"system": "Be kind."},
            {"modelfile": [option("system", None, "Be kind.")]},
        ),
        ({"parameter": ["temperature=0.1"]}, {"modelfile": [option("parameter", [], ["temperature=0.1"])]}),
        ({"checkpoint_steps": 7, "use_checkpoint": True, "compare": False}, {}),
    ],
)
def test_an_option_redoes_exactly_the_stages_that_use_it(
    run_copy: RunFolder, changes: dict[str, Any], expected: dict[str, list[Reason]]
) -> None:
    assert to_run(run_copy, **changes) == expected


def test_another_quantization_never_retrains(run_copy: RunFolder) -> None:
    assert set(to_run(run_copy, quantization="Q8_0")) == {"quantize", "modelfile"}
    assert set(to_run(run_copy, quantization="none")) == {"quantize", "modelfile"}


def test_data_decides_by_content_by_number_and_by_order(
    run_copy: RunFolder, write_chats: Callable[..., Path], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    (tmp_path / "elsewhere").mkdir()
    same = shutil.copyfile(chats, tmp_path / "elsewhere" / "chats.jsonl")
    assert to_run(run_copy, train_data=[same]) == {}
    with chats.open("a") as file:
        file.write(" \n")
    assert to_run(run_copy) == {"prepare": [changed("training data 1 (chats.jsonl)")]}
    shutil.copyfile(same, chats)
    more = write_chats(2, "more.jsonl", first=50)
    assert to_run(run_copy, train_data=[chats, more]) == {"prepare": [changed("training data 2 (more.jsonl)")]}
    assert list(to_run(run_copy, eval_data=[more], eval_split=0)) == ["prepare"]
    assert list(to_run(run_copy, train_data=[more, chats])) == ["prepare"]
    chats.unlink()
    assert list(to_run(run_copy)) == ["prepare"]


def test_a_data_file_that_is_taken_away_or_has_a_namesake_counts(
    run_copy: RunFolder, write_chats: Callable[..., Path], tmp_path: Path, reporter: PlainReporter
) -> None:
    (tmp_path / "two").mkdir()
    namesake = shutil.copyfile(write_chats(2, "more.jsonl", first=50), tmp_path / "two" / "chats.jsonl")
    both = [tmp_path / "chats.jsonl", namesake]
    run_pipeline(config_of(run_copy, train_data=both), reporter, ["prepare"])
    assert set(to_run(run_copy)) == {"train"}
    assert set(to_run(run_copy, train_data=both[:1])) == {"prepare", "train"}
    assert set(to_run(run_copy, train_data=both[::-1])) == {"prepare", "train"}
    with both[0].open("a") as file:
        file.write("\n")
    assert set(to_run(run_copy)) == {"prepare", "train"}


def test_a_base_model_of_the_same_shape_counts(
    run_copy: RunFolder, tiny_base: Path, other_weights: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    assert to_run(run_copy, base_model=str(other)) == {}
    shutil.copyfile(other_weights, other / "model.safetensors")
    expected = {
        "train": [changed("the base model")],
        "merge": [changed("the base model")],
    }
    assert to_run(run_copy, base_model=str(other)) == expected
    weights = bytearray((tiny_base / "model.safetensors").read_bytes())
    weights[-1000] ^= 1  # one bit: no library notices it
    (other / "model.safetensors").write_bytes(weights)
    assert to_run(run_copy, base_model=str(other)) == expected


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "stage", "reason"),
    [
        (lambda run: _flip(run.gguf), "convert", altered("Merged.gguf")),
        (lambda run: run.gguf.unlink(), "convert", missing("Merged.gguf")),
        (lambda run: os.truncate(run.gguf, 5000), "convert", altered("Merged.gguf")),
        (
            lambda run: _flip(run.quantized("Q4_K_M")),
            "quantize",
            altered("MergedQ4_K_M.gguf"),
        ),
        (
            lambda run: _flip(run.adapter / "adapter_model.safetensors"),
            "train",
            altered("adapter"),
        ),
        (
            lambda run: (run.adapter / "adapter_config.json").unlink(),
            "train",
            altered("adapter"),
        ),
        (lambda run: shutil.rmtree(run.merged_model), "merge", missing("merged_model")),
        (lambda run: run.modelfile().write_text("FROM x"), "modelfile", altered("Modelfile")),
        (lambda run: shutil.rmtree(run.prepared), "prepare", missing(".kolotune/prepared")),
        (lambda run: run.record("convert").unlink(), "convert", Reason(ReasonKind.NEVER_RAN)),
        (lambda run: os.truncate(run.record("train"), 100), "train", Reason(ReasonKind.NEVER_RAN)),
        (lambda run: run.record("merge").write_bytes(b"\0" * 700), "merge", Reason(ReasonKind.NEVER_RAN)),
    ],
)
def test_damage_is_seen_and_named(run_copy: RunFolder, spoil: Any, stage: str, reason: Reason) -> None:
    assert to_run(run_copy) == {}
    spoil(run_copy)
    found = to_run(run_copy)
    assert reason in found[stage]
    # A stage that reads what was damaged says so too; nothing else has work.
    kinds = (ReasonKind.INPUT_CHANGED, ReasonKind.OUTPUT_ALTERED)
    assert all(why[0].kind in kinds for name, why in found.items() if name != stage)


def test_damage_in_the_middle_is_mended_by_that_stage_alone(
    run_copy: RunFolder, capsys: Any, reporter: PlainReporter
) -> None:
    before = hashes(run_copy)
    run_copy.quantized("Q4_K_M").write_bytes(run_copy.quantized("Q4_K_M").read_bytes()[:4_000_000])
    run_copy.modelfile().unlink()
    run_pipeline(config_of(run_copy), reporter)
    printed = capsys.readouterr().out
    assert "... quantize: quantizing (MergedQ4_K_M.gguf " in printed
    assert "... modelfile: writing the Modelfiles (Modelfile is missing" in printed
    assert printed.count("done before") == 4
    assert hashes(run_copy) == before


def test_a_damaged_saved_config_is_a_config_error_with_its_line(run_copy: RunFolder) -> None:
    run_copy.config.write_text("epochs: 1\nlora_rank: [\n")
    with pytest.raises(KolotuneError, match=r"config.yaml:3: no valid YAML"):
        read_status(run_copy)


def test_a_run_folder_may_be_moved(run_copy: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    moved = RunFolder(run_copy.root.rename(tmp_path / "deep" / "moved run é"))
    assert to_run(moved) == {}


def test_the_saved_config_repeats_the_run(run_copy: RunFolder, kolotune: Any, monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "other place").mkdir()
    monkeypatch.chdir(tmp_path / "other place")
    code, output = kolotune("run", "--config", run_copy.config)
    assert code == 0
    assert output.count("done before") == 6
    assert list((tmp_path / "other place").iterdir()) == []


def test_the_default_folder_is_saved_as_an_absolute_one(
    tiny_base: Path, write_chats: Callable[..., Path], kolotune: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kolotune("prepare", write_chats(), "--base-model", tiny_base)[0] == 0
    saved = configs.load_file(tmp_path / "outputs" / "config.yaml")
    assert saved["output_dir"] == str(tmp_path / "outputs")


def test_automatic_choices_are_made_once(run_copy: RunFolder, monkeypatch: Any, reporter: PlainReporter) -> None:
    (run_copy.choices).write_text(json.dumps({"dtype": "bf16", "template_date": "2020-02-02"}))
    loaded = configs.load_file(run_copy.config)
    asked = {**loaded, "dtype": "auto", "template_date": None}
    config = configs.resolve((asked, "test", run_copy.root))
    monkeypatch.setattr(choices.hardware, "best_dtype", lambda: pytest.fail("chosen a second time"))
    run_pipeline(config, reporter, [])
    saved = configs.load_file(run_copy.config)
    assert (saved["dtype"], saved["template_date"]) == ("bf16", "2020-02-02")


# --- who holds the folder

HOLD = """
import sys, time
from pathlib import Path
from kolotune.pipeline.lock import locked
from kolotune.run_folder.layout import RunFolder
with locked(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run_copy: RunFolder) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_copy.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_not_in_the_way(
    run_copy: RunFolder, holder: subprocess.Popen[str], reporter: PlainReporter
) -> None:
    before = hashes(run_copy)
    with pytest.raises(RunFolderError, match=rf"is in use by process {holder.pid}$") as error:
        run_pipeline(config_of(run_copy, system="x"), reporter)
    assert error.value.exit_code == 12
    assert "Wait" in error.value.hint
    write_mark(run_copy, "modelfile", MarkState.RUNNING)
    run_copy.modelfile().unlink()
    assert states(run_copy)["modelfile"] == "running"
    holder.kill()  # it can't take its name away
    holder.wait()
    assert states(run_copy)["modelfile"] == "interrupted"
    run_pipeline(config_of(run_copy), reporter, ["modelfile"])
    assert states(run_copy)["modelfile"] == "done"
    assert hashes(run_copy) == before
    assert not run_copy.lock_holder.exists()


def test_looking_at_a_held_folder_is_allowed_and_does_not_free_it(
    run_copy: RunFolder, holder: subprocess.Popen[str], reporter: PlainReporter
) -> None:
    for _ in range(3):
        assert set(states(run_copy).values()) == {"done"}
    with pytest.raises(RunFolderError):
        run_pipeline(config_of(run_copy), reporter)


def test_a_refused_run_leaves_the_folder_as_it_was(run_copy: RunFolder, reporter: PlainReporter) -> None:
    before, saved = hashes(run_copy), run_copy.config.read_bytes()
    for changes in ({"base_model": "/no/such"}, {"max_seq_length": 99999}, {"parameter": ["nonsense=1"]}):
        with pytest.raises(KolotuneError):
            run_pipeline(config_of(run_copy, **changes), reporter)
        assert run_copy.config.read_bytes() == saved
        assert hashes(run_copy) == before
    assert to_run(run_copy) == {}


def test_a_failed_stage_is_shown_with_its_cause_and_its_traceback_is_kept(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text("{\n")
    with pytest.raises(KolotuneError, match=r"chats.jsonl:1: "):
        run_pipeline(config_of(run_copy), reporter)
    found = {each.name: each for each in read_status(run_copy)}["prepare"]
    assert found.state is StageState.FAILED
    assert "chats.jsonl:1" in found.failure and found.failure == found.explanations()[0]
    assert "Traceback" in run_copy.log("error").read_text()
    assert (run_copy.prepared / "train.safetensors").is_file()  # the good one


# --- stopped

needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


def start_training(run: RunFolder, *more: str, epochs: int = 2000) -> subprocess.Popen[str]:
    """`kolotune run` with a training that would last for minutes, in its third step or later."""
    program = [sys.executable, "-m", "kolotune", "run", "--config", str(run.config), "--output-dir", str(run.root)]
    argv = [*program, "--epochs", str(epochs), "--scheduler-type", "constant", "--warmup-steps", "0", *more]
    log = (run.root.parent / "output").open("w")
    run.metrics.unlink(missing_ok=True)
    process = subprocess.Popen(argv, stdout=log, stderr=log, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (run.metrics.is_file() and run.metrics.read_text().count('"loss"') >= 3):
        assert process.poll() is None, (run.root.parent / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def stop(process: subprocess.Popen[str], run: RunFolder, *numbers: int) -> str:
    """Sends signals and returns what was printed; nothing that was started may be alive afterwards."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.05)
    assert process.wait(20) == 130
    assert not psutil.wait_procs(family, timeout=2)[1]
    return (run.root.parent / "output").read_text()


@needs_posix
def test_a_stopped_training_is_shown_and_goes_on(run_copy: RunFolder, kolotune: Any, monkeypatch: Any) -> None:
    token = "hf_PlantedTokenThatMustNotBeSeen"
    monkeypatch.setenv("HF_TOKEN", token)
    before = hashes(run_copy)
    printed = stop(start_training(run_copy, "--checkpoint-steps", "1"), run_copy, signal.SIGTERM)
    assert "error: stopped during train" in printed
    assert "--use-checkpoint" in printed
    assert "Traceback" not in printed
    assert states(run_copy)["train"] == "interrupted"
    assert hashes(run_copy) == before  # the good adapter of before is still there
    assert partials(run_copy) == []
    done = json.loads(run_copy.metrics.read_text().splitlines()[-1])["step"]
    code, output = kolotune("train", run_copy.root, "--epochs", str(done + 3), "--use-checkpoint")
    assert code == 0, output
    assert "going on from step" in output
    steps = [json.loads(line)["step"] for line in run_copy.metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 4))
    assert states(run_copy)["train"] == "done"
    assert token not in printed + output
    assert not [path for path in run_copy.root.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(2,), (15, 15), (2, 2, 2), (2, 15)])
def test_one_signal_or_several_end_everything(run_copy: RunFolder, kolotune: Any, numbers: tuple[int, ...]) -> None:
    printed = stop(start_training(run_copy), run_copy, *numbers)
    assert "Traceback" not in printed
    assert "error: stopped" in printed
    assert states(run_copy)["train"] == "interrupted"
    code, _ = kolotune("run", "--config", run_copy.config, "--epochs", "1")
    assert code == 0
    assert set(states(run_copy).values()) == {"done"}


@needs_posix
@pytest.mark.slow
def test_after_a_kill_the_next_run_makes_the_same(run_copy: RunFolder, kolotune: Any) -> None:
    before = hashes(run_copy)
    process = start_training(run_copy)
    family = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *family):
        os.kill(each.pid, signal.SIGKILL)
    process.wait()
    assert states(run_copy)["train"] == "interrupted"
    shutil.rmtree(run_copy.adapter)
    # The scheduler and warmup of the killed run were saved; the first run's are given again.
    flags = ["--epochs", "1", "--scheduler-type", "cosine"]
    saved = configs.load_file(run_copy.config)
    saved.pop("warmup_steps")
    run_copy.config.write_text(configs.dump(configs.resolve((saved, "saved", run_copy.root))))
    assert kolotune("run", "--config", run_copy.config, *flags)[0] == 0
    assert hashes(run_copy) == before
