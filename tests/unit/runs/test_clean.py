"""Freeing what can be made again: the run still matches its records, and makes again only what it needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.runs import config_of, states

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.lock import locked
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import read_status
from kolotune.run_folder.cleaned import add_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import MarkState, write_mark
from kolotune.runs.clean import FreeableFile, find_freeable, free
from kolotune.serving.terminal_chat import open_chat


def names(items: list[FreeableFile]) -> list[str]:
    return [each.path.name for each in items]


def clean(run: RunFolder, **more: Any) -> list[str]:
    with locked(run):
        items = find_freeable(run, **more)
        free(run, items)
    return names(items)


def snapshot(run: RunFolder) -> dict[str, str]:
    hasher = Hasher()
    paths = [
        run.adapter,
        run.metrics,
        run.config,
        run.prepared,
        *run.state.glob("*.json"),
        *run.root.glob("Modelfile*"),
    ]
    return {path.name: hasher.of(path) for path in [*paths, run.quantized("Q4_K_M")] if path != run.hash_cache}


def test_what_can_be_made_again_is_freed_and_the_rest_stays(run_copy: RunFolder, reporter: PlainReporter) -> None:
    before = snapshot(run_copy)
    assert run_copy.checkpoints.is_dir()
    (run_copy.root / ".Merged.gguf.partial").write_text("half")
    freed = clean(run_copy)
    assert freed == ["checkpoints", "merged_model", "Merged.gguf", ".Merged.gguf.partial"]
    assert not any((run_copy.root / name).exists() for name in freed) and not run_copy.checkpoints.exists()
    assert before.items() <= snapshot(run_copy).items()
    assert list(states(run_copy).values()) == ["done", "done", "cleaned", "cleaned", "done", "done"]
    assert clean(run_copy) == []


def test_a_second_run_restores_nothing_and_a_verb_its_own_output(
    run_copy: RunFolder, reporter: PlainReporter, kolotune: Any
) -> None:
    merged, gguf = Hasher().of(run_copy.merged_model), Hasher().of(run_copy.gguf)
    clean(run_copy)
    run_pipeline(config_of(run_copy), reporter)
    assert not run_copy.gguf.exists() and not run_copy.merged_model.exists()
    code, output = kolotune("verify", run_copy.root)
    assert code == 0 and "Merged.gguf, which was cleaned" in output
    code, output = kolotune("merge", run_copy.root)
    assert code == 0 and "merged_model is missing" in output
    assert Hasher().of(run_copy.merged_model) == merged and not run_copy.gguf.exists()
    clean(run_copy)
    code, output = kolotune("convert", run_copy.root)  # which needs the merged model again
    assert code == 0
    assert (Hasher().of(run_copy.merged_model), Hasher().of(run_copy.gguf)) == (merged, gguf)
    assert set(states(run_copy).values()) == {"done"}


def test_what_a_change_needs_is_made_again(run_copy: RunFolder, reporter: PlainReporter) -> None:
    clean(run_copy)
    run_pipeline(config_of(run_copy, system="Be kind."), reporter)
    assert "Be kind." in run_copy.modelfile().read_text()
    assert not run_copy.gguf.exists()
    run_pipeline(config_of(run_copy, quantization="Q8_0"), reporter)
    assert run_copy.quantized("Q8_0").is_file() and run_copy.gguf.is_file() and run_copy.merged_model.is_dir()
    assert set(states(run_copy).values()) == {"done"}


def test_all_but_the_adapter(run_copy: RunFolder, reporter: PlainReporter) -> None:
    assert "MergedQ4_K_M.gguf" in clean(run_copy, all_but_adapter=True)
    assert run_copy.adapter.is_dir() and not list(run_copy.root.glob("*.gguf"))
    run_pipeline(config_of(run_copy), reporter)
    assert states(run_copy)["quantize"] == "cleaned" and not list(run_copy.root.glob("*.gguf"))
    with pytest.raises(ArtifactError, match="was cleaned") as error:
        open_chat(run_copy, reporter)
    assert "kolotune quantize" in error.value.hint


def test_an_unfinished_or_changed_run_keeps_what_it_needs(run_copy: RunFolder) -> None:
    run_copy.record("convert").unlink()
    assert names(find_freeable(run_copy)) == ["checkpoints"]
    write_mark(run_copy, "train", MarkState.INTERRUPTED)
    run_copy.record("train").unlink()
    assert find_freeable(run_copy) == []


def test_a_file_that_the_run_did_not_make_stays(run_copy: RunFolder, tmp_path: Path) -> None:
    run_copy.gguf.write_bytes(b"mine")
    assert names(find_freeable(run_copy)) == ["checkpoints"]
    kept = tmp_path / "elsewhere"
    run_copy.checkpoints.rename(kept)
    run_copy.checkpoints.symlink_to(kept)
    assert clean(run_copy) == [] and kept.is_dir()


def test_without_quantizations_the_unquantized_gguf_is_the_result(run_copy: RunFolder, reporter: PlainReporter) -> None:
    run_pipeline(config_of(run_copy, quantization="none"), reporter)
    for path in run_copy.root.glob("MergedQ*.gguf"):
        path.unlink()
    assert "Merged.gguf" not in clean(run_copy, all_but_adapter=True)


def test_a_record_without_the_removal_does_not_count(run_copy: RunFolder) -> None:
    """Killed between the two: what is there counts."""
    add_cleaned(run_copy, {"Merged.gguf": "0" * 64, "merged_model": Hasher().of(run_copy.merged_model)})
    assert set(states(run_copy).values()) == {"done"}
    run_copy.gguf.unlink()  # by hand: it is missing, whatever is recorded about a different file
    assert states(run_copy)["convert"] == "will run"


def test_an_exported_adapter_is_cleaned_too(run_copy: RunFolder, tmp_path: Path, kolotune: Any) -> None:
    out = tmp_path / "exported"
    assert kolotune("export", run_copy.adapter, "--output-dir", out, "--quantization", "Q8_0", "--no-compare")[0] == 0
    exported = RunFolder(out)
    assert clean(exported) == ["merged_model", "Merged.gguf"]
    assert [each.state for each in read_status(exported)] == ["cleaned", "cleaned", "done", "done"]
    code, _ = kolotune("modelfile", out, "--system", "Be brief.")  # its tokenizer is in the merged model
    assert code == 0 and exported.merged_model.is_dir() and not exported.gguf.exists()
    assert "Be brief." in exported.modelfile("Q8_0").read_text()


def test_clean_shows_and_asks_and_refuses_a_busy_run(run_copy: RunFolder, kolotune: Any) -> None:
    code, output = kolotune("clean", run_copy.root, "--dry-run")
    assert code == 0 and "merged again from adapter and base" in output and run_copy.gguf.is_file()
    code, output = kolotune("clean", run_copy.root)
    assert code == 2 and "--yes" in output and run_copy.gguf.is_file()
    with locked(run_copy):
        code, output = kolotune("clean", run_copy.root, "--yes")
    assert code == 12 and "is in use by process" in output and run_copy.gguf.is_file()
    code, output = kolotune("clean", run_copy.root, "--yes", "--json")
    events = [json.loads(line) for line in output.splitlines()]
    assert code == 0 and [each["event"] for each in events] == ["table", "success"]
    assert not run_copy.gguf.exists()
    code, output = kolotune("status", run_copy.root)
    assert "cleaned" in output and "made again when needed" in output
    assert kolotune("clean", run_copy.root.parent)[0] == 12


def test_the_cache_is_shown_and_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kolotune: Any) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    for kind in ("models", "base_ggufs"):
        (tmp_path / "cache" / kind).mkdir(parents=True)
        (tmp_path / "cache" / kind / "file").write_bytes(os.urandom(2000))
    code, output = kolotune("runs", tmp_path, "--cache")
    assert code == 0 and "base_ggufs  2.0 kB" in output and "No runs in" in output
    assert kolotune("clean", "--cache", "base_ggufs")[0] == 2
    code, output = kolotune("clean", "--cache", "base_ggufs", "--yes")
    assert code == 0 and "freed 2.0 kB" in output
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["models"]
    code, output = kolotune("clean", "--cache", "nonsense", "--yes")
    assert code == 2 and "base_ggufs" in output
