"""Converter and library agree: on every architecture and tensor name, and for a model before it is trained."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kolotune import llamacpp
from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import convert, load_proof, plan_cache
from kolotune.gguf.conversion_plan import ConversionPlan, write_sparse_gguf
from kolotune.gguf.model_skeleton import ModelSkeleton, read_skeleton

NOT_CONVERTED = {"clip", "gptj"}
"""Of the converter's names of architectures: what sees or hears, and one that it has no code for."""
NOT_LOADED = {"blk.%d.ffn": {"mpt"}}
"""Scales of models that AWQ quantized, which the library has as ``blk.%d.ffn.act``."""
_NAMES = """
import json
from gguf import constants
tensors = {}
for architecture, names in constants.MODEL_TENSORS.items():
    for name in names:
        if name in constants.TENSOR_NAMES:
            text = constants.TENSOR_NAMES[name].replace("{bid}", "%d").replace("{xid}", "%d")
            tensors.setdefault(text, []).append(constants.MODEL_ARCH_NAMES[architecture])
print(json.dumps([list(constants.MODEL_ARCH_NAMES.values()), tensors]))
"""


@pytest.fixture(scope="module")
def names(toolchain: llamacpp.Toolchain) -> tuple[set[str], dict[str, set[str]]]:
    """The architectures that the converter knows; its tensors' names, with the architectures that have them."""
    code = f"import sys; sys.path.insert(0, {str(toolchain.root / 'gguf-py')!r})\n{_NAMES}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    architectures, tensors = json.loads(done.stdout)
    return {*architectures} - NOT_CONVERTED, {name: {*users} - NOT_CONVERTED for name, users in tensors.items()}


def problem(architecture: str, folder: Path) -> str:
    """What the library says of a GGUF that has nothing but an architecture."""
    import gguf

    writer = gguf.GGUFWriter(folder / "hollow.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ToolchainError) as raised:
        load_proof.load(folder / "hollow.gguf", vocabulary=True)
    return raised.value.cause


def test_the_library_knows_every_architecture(names: tuple[set[str], dict[str, set[str]]], tmp_path: Path) -> None:
    architectures, _ = names
    assert len(architectures) > 140
    assert "unknown model architecture" in problem("no-such", tmp_path)
    assert "unsupported model architecture" in problem("gptj", tmp_path)
    unknown = {name for name in architectures if "architecture" in problem(name, tmp_path)}
    assert unknown == set()


def test_the_library_knows_every_name_of_a_tensor(names: tuple[set[str], dict[str, set[str]]]) -> None:
    """They are in the library's data as they are; the linker may share the ends of texts."""
    _, tensors = names
    assert len(tensors) > 500
    content = b"".join(file.read_bytes() for file in shared_libraries.find().files)
    unknown = {name: users for name, users in tensors.items() if users and name.encode() + b"\0" not in content}
    assert unknown == NOT_LOADED
    assert b"blk.%d.no_such\0" not in content


@pytest.fixture
def skeleton(tiny_base: Path) -> ModelSkeleton:
    return read_skeleton(tiny_base)


@pytest.fixture
def plan(skeleton: ModelSkeleton, toolchain: llamacpp.Toolchain, tmp_path: Path) -> ConversionPlan:
    plan = plan_cache.find_plan(skeleton, "f16", toolchain, tmp_path / "log").plan
    assert plan is not None
    return plan


def test_a_gguf_is_loaded_without_its_weights(plan: ConversionPlan, tmp_path: Path) -> None:
    write_sparse_gguf(plan, tmp_path / "model.gguf")
    load_proof.prove_loadable(tmp_path / "model.gguf", tmp_path / "log")


@pytest.mark.parametrize(
    ("written", "changed", "reason"),
    [
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", r".*tensor 'blk.0.attn_q.weight' not found$"),
        (b"llama", b"lluma", r"unknown model architecture: 'lluma'"),
        (b"llama.block_count", b"llama.block_cuont", r".*key not found in model: llama.block_count$"),
    ],
)
def test_what_the_library_does_not_know_is_refused(
    written: bytes, changed: bytes, reason: str, plan: ConversionPlan, tmp_path: Path
) -> None:
    assert written in plan.header
    write_sparse_gguf(dataclasses.replace(plan, header=plan.header.replace(written, changed)), tmp_path / "model.gguf")
    with pytest.raises(ToolchainError, match=rf"can't load the model's GGUF: {reason}") as raised:
        load_proof.prove_loadable(tmp_path / "model.gguf", tmp_path / "log")
    assert "LLAMA_CPP_DIR" in raised.value.hint


def test_the_dry_conversion_includes_loading_once(
    skeleton: ModelSkeleton,
    plan: ConversionPlan,
    toolchain: llamacpp.Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reporter: PlainReporter,
) -> None:
    damaged = dataclasses.replace(plan, header=plan.header.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    folder = tmp_path / "plan"
    folder.mkdir()
    monkeypatch.setattr(plan_cache, "plan_folder", lambda *_: folder)
    result = plan_cache.PlanResult(damaged, is_convertible=True)
    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "find_plan", lambda *_: result)
        with pytest.raises(ToolchainError, match=r"tensor 'blk.1.ffn_up.weight' not found$"):
            convert.prove(skeleton, "f16", tmp_path / "log", reporter)
        assert not load_proof.is_proven(folder)
        result = plan_cache.PlanResult(plan, is_convertible=True)
        convert.prove(skeleton, "f16", tmp_path / "log", reporter)
        assert load_proof.is_proven(folder)
        monkeypatch.setattr(load_proof, "prove_loadable", lambda *_, **__: pytest.fail("loaded twice"))
        convert.prove(skeleton, "f16", tmp_path / "log", reporter)
        patch.setenv("LLAMA_CPP_DIR", str(tmp_path))
        assert not load_proof.is_proven(folder), "a user's own may change"
    monkeypatch.setattr(shared_libraries, "VERSION", "2026.1.1")
    with pytest.raises(ToolchainError):
        load_proof.is_proven(folder)


def test_a_model_without_a_plan(
    skeleton: ModelSkeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reporter: PlainReporter
) -> None:
    """Its tokenizer and shape are loaded; the converter writes no more without weights."""
    monkeypatch.setenv("KOLOTUNE_CONVERSION_PLAN", "off")
    monkeypatch.setattr(plan_cache, "plan_folder", lambda *_: tmp_path / "none")
    loaded = []
    original = load_proof.prove_loadable

    def prove_loadable(gguf: Path, log: Path, *, vocabulary: bool) -> None:
        loaded.append(vocabulary)
        original(gguf, log, vocabulary=vocabulary)

    monkeypatch.setattr(load_proof, "prove_loadable", prove_loadable)
    convert.prove(skeleton, "f16", tmp_path / "log", reporter)
    assert loaded == [True]
