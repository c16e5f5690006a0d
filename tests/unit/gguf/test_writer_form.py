"""Every GGUF is in the form of llama.cpp's own writer: `llama-quantize … COPY` does not change a byte of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.llamacpp_writer import copy_gguf, is_kept

from kolotune import llamacpp
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import header, writer_form
from kolotune.gguf.convert import convert_adapter, convert_folder
from kolotune.gguf.quantize import quantize_file
from kolotune.run_folder.layout import RunFolder

NAMES = (
    "output.weight", "token_embd.weight", "blk.10.attn_q.weight", "blk.2.attn_q.weight", "blk.2.attn_q.bias",
    "blk.2.attn_k.weight", "blk.1.ffn_down_exps.weight", "dec.blk.10.x", "dec.blk.2.x", "blk.x", "blk.0", "Zeta",
    "überall", "blk.3.attn_q.weight.scale", "blk.03.attn_q.weight", "v.blk.1.x",
)  # fmt: skip
SHAPES = ((8,), (1, 64), (64, 1), (1,), (), (1, 1, 5), (2, 1, 3), (1, 4, 1), (3, 2, 8), (33,))


NO_BOS: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def written(path: Path, seed: int, *, arranges: bool = True) -> Path:
    """Write a Llama without sense: fields of all types, tensors of all shapes, in random order."""
    generator = random.Random(seed)
    writer = gguf.GGUFWriter(path, "llama")
    fields: list[Callable[[], Any]] = [
        lambda: writer.add_block_count(1),
        lambda: writer.add_context_length(64),
        lambda: writer.add_embedding_length(64),
        lambda: writer.add_feed_forward_length(96),
        lambda: writer.add_head_count(4),
        lambda: writer.add_layer_norm_rms_eps(1e-5),
        lambda: writer.add_vocab_size(32),
        lambda: writer.add_string("a.text", "täxt\0behind"),
        lambda: writer.add_array("a.texts", ["a", "\0", "b\0c", "", "ü"]),
        lambda: writer.add_array("a.bytes", b"\0\1\0"),
        lambda: writer.add_array("some.tokens", [b"x\0y", b"z"]),
        lambda: writer.add_array("a.flags", [True, False, True]),
        lambda: writer.add_array("a.floats", [0.1, -2.5]),
        lambda: writer.add_array("a.numbers", [1, -2, 3]),
        lambda: writer.add_float64("a.double", 0.1),
        lambda: writer.add_int8("an.int8", -3),
        lambda: writer.add_uint64("a.large", 2**63),
        lambda: writer.add_uint16("split.no.more", 3),
        lambda: writer.add_bool("tokenizer.ggml.add_bos_token", True),
        lambda: writer.add_quantization_version(1),
    ]
    fields += [lambda: writer.add_file_type(1)] * (seed % 4 != 0)
    for add in generator.sample(fields, len(fields)):
        add()
    for name in generator.sample(NAMES, len(NAMES)):
        shape = generator.choice(SHAPES)
        writer.add_tensor(name, np.random.default_rng(seed).random(shape).astype(generator.choice(("f2", "f4"))))
    if arranges:
        writer_form.arrange(writer, "f16")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("seed", range(20))
def test_any_order_comes_into_the_form(seed: int, tmp_path: Path) -> None:
    before = written(tmp_path / "before.gguf", seed, arranges=False)
    after = written(tmp_path / "after.gguf", seed)
    assert is_kept(after) and not is_kept(before)
    assert writer_form.is_in_form(header.read(after)) and not writer_form.is_in_form(header.read(before))
    if "general.file_type" in header.read(before).fields:
        assert copy_gguf(before, tmp_path / "copy.gguf").read_bytes() == after.read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"blk.2.attn_k.weight", b"blk.9.attn_k.weight"),
        (b"output.weight", b"zutput.weight"),
        (b"general.file_type", b"general.file_typo"),
        (b"a.double", b"split.no"),
    ],
)
def test_another_order_is_noticed(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", 3)
    content = path.read_bytes()
    assert content.count(old) == 1 and writer_form.is_in_form(header.read(path))
    path.write_bytes(content.replace(old, new))
    assert not writer_form.is_in_form(header.read(path)) and not is_kept(path)


def test_a_model_that_does_not_say_its_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gptneox")
    writer_form.arrange(writer, "bf16")
    assert {name: field.value for name, field in writer.kv_data[0].items()} == {
        "general.architecture": "gptneox", "general.quantization_version": 2, "general.file_type": 32,
    }  # fmt: skip


@pytest.mark.parametrize("plan", ["on", "off"])
def test_with_and_without_a_plan_whole_and_lean(
    plan: str,
    finished: Config,
    tiny_base: Path,
    tmp_path: Path,
    reporter: PlainReporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokenizer's config asks for a BOS that its post-processor does not add, so the flag is changed."""
    monkeypatch.setenv("KOLOTUNE_CONVERSION_PLAN", plan)
    run = RunFolder(finished.output_dir)
    shutil.copytree(run.merged_model, tmp_path / "model")
    for file, change in (
        ("tokenizer.json", {"post_processor": NO_BOS}),
        ("tokenizer_config.json", {"add_bos_token": True}),
    ):
        content = json.loads((tmp_path / "model" / file).read_text(encoding="utf-8"))
        (tmp_path / "model" / file).write_text(json.dumps({**content, **change}), encoding="utf-8")
    whole, lean, log = tmp_path / "whole.gguf", tmp_path / "lean.gguf", tmp_path / "log"
    facts = convert_folder(tmp_path / "model", whole, log, reporter)
    convert_adapter(
        run.adapter, tiny_base, tmp_path / "model", dtype="f16", name="model", target=lean, log=log, reporter=reporter
    )
    assert (facts["form"], facts["streamed"]) == ("writer", plan == "on")
    assert header.read(whole).fields["tokenizer.ggml.add_bos_token"] is True
    assert is_kept(whole) and lean.read_bytes() == whole.read_bytes()


def test_quantized_files_are_in_the_form(finished: Config, tmp_path: Path, reporter: PlainReporter) -> None:
    run = RunFolder(finished.output_dir)
    for name in ("Q8_0", "Q4_K_M", "IQ4_NL", "BF16"):
        quantize_file(run.gguf, tmp_path / f"{name}.gguf", name, tmp_path / "log", reporter)
        assert is_kept(tmp_path / f"{name}.gguf") and writer_form.is_in_form(header.read(tmp_path / f"{name}.gguf"))


@pytest.mark.slow
def test_quantized_bytes_do_not_depend_on_the_form(
    finished: Config, tmp_path: Path, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(finished.output_dir)
    monkeypatch.setenv(writer_form.SWITCH, "converter")
    assert convert_folder(run.merged_model, tmp_path / "f16.gguf", tmp_path / "log", reporter)["form"] == "converter"
    assert not is_kept(tmp_path / "f16.gguf")
    for name in ("Q8_0", "Q4_K_M"):
        for source in (run.gguf, tmp_path / "f16.gguf"):
            quantize_file(source, tmp_path / f"{source.stem}-{name}.gguf", name, tmp_path / "log", reporter)
        ours, theirs = (tmp_path / f"{stem}-{name}.gguf" for stem in (run.gguf.stem, "f16"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_converter_that_writes_otherwise_is_noticed(
    tiny_base: Path,
    toolchain: llamacpp.Toolchain,
    tmp_path: Path,
    reporter: PlainReporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "llama.cpp"
    own.mkdir()
    for name in ("conversion", "gguf-py"):
        (own / name).symlink_to(toolchain.root / name)
    (own / "convert_hf_to_gguf.py").write_text(
        "import gguf, runpy\n"
        "write = gguf.GGUFWriter.write_ti_data_to_file\n"
        "def write_reversed(writer):\n"
        "    writer.tensors[0] = dict(reversed(writer.tensors[0].items()))\n"
        "    write(writer)\n"
        "gguf.GGUFWriter.write_ti_data_to_file = write_reversed\n"
        f"runpy.run_path({str(toolchain.converter)!r}, run_name='__main__')\n"
    )
    monkeypatch.setenv("LLAMA_CPP_DIR", str(own))
    with pytest.raises(ToolchainError, match=r"form of llama\.cpp's own writer"):
        convert_folder(tiny_base, tmp_path / "out.gguf", tmp_path / "log", reporter)
    assert not (tmp_path / "out.gguf").exists()
    monkeypatch.setenv(writer_form.SWITCH, "converter")
    assert convert_folder(tiny_base, tmp_path / "out.gguf", tmp_path / "log", reporter)["form"] == "converter"
