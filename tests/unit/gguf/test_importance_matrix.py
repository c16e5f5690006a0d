"""The importance matrix compared with the inputs that transformers computes, and its effect on quantizing."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kolotune import llamacpp
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import convert, importance_matrix, quantize, run_matrix
from kolotune.llamacpp import ggml

CHATS = [list(range(3, 43)), [7, 5, 11, 13] * 5, list(range(200, 230))]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rows are whole blocks, with norms that make some columns matter more."""
    folder = tmp_path_factory.mktemp("importance") / "model"
    shape = {"vocab_size": 49152, "tie_word_embeddings": True, "hidden_size": 256, "intermediate_size": 512}
    tiny_model("llama", folder, **shape)
    for name in TOKENIZER_FILES:
        if (tiny_base / name).is_file():
            shutil.copyfile(tiny_base / name, folder / name)
    random = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name, each in tensors.items():
        if name.endswith("layernorm.weight"):
            tensors[name] = random.lognormal(0, 1.5, each.shape).astype(each.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path) -> Path:
    """The part of prepared chats that a matrix needs."""
    folder = model.parent / "prepared"
    folder.mkdir()
    offsets = np.cumsum([0, *map(len, CHATS)])
    save_file({"ids": np.concatenate(CHATS).astype(np.int32), "offsets": offsets}, folder / "train.safetensors")
    return folder / "train.safetensors"


@pytest.fixture(scope="module")
def plain(model: Path, toolchain: llamacpp.Toolchain, reporter: PlainReporter) -> Path:
    """The model as an unquantized GGUF."""
    target = model.parent / "Plain.gguf"
    convert.convert_folder(model, target, model.parent / "log", reporter)
    return target


@pytest.fixture(scope="module")
def matrix(plain: Path, tokens: Path, reporter: PlainReporter) -> Path:
    target = plain.parent / "matrix.gguf"
    run_matrix.make_matrix(plain, tokens.parent, target, plain.parent / "log", reporter)
    return target


def test_it_holds_the_mean_squares_of_each_weights_inputs(model: Path, matrix: Path) -> None:
    import torch
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    recorded: dict[str, list[torch.Tensor]] = {}
    for path, module in loaded.named_modules():
        if path.endswith(tuple(NAMES)):
            module.register_forward_pre_hook(
                lambda _, args, path=path: recorded.setdefault(path, []).append(args[0][0])
            )
    with torch.no_grad():
        for chat in CHATS:
            loaded(input_ids=torch.tensor([chat]))
    means = importance_matrix.read(matrix)
    layers = loaded.config.num_hidden_layers
    assert len(means) == 7 * layers
    for path, inputs in recorded.items():
        layer, _, module = path.removeprefix("model.layers.").partition(".")
        expected = torch.cat(inputs).square().mean(dim=0).numpy()
        np.testing.assert_allclose(
            means[f"blk.{layer}.{NAMES[module]}.weight"], expected, rtol=0.02, atol=1e-3 * expected.max()
        )


def test_it_is_reproducible(plain: Path, tokens: Path, matrix: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    run_matrix.make_matrix(plain, tokens.parent, tmp_path / "again.gguf", tmp_path / "log", reporter)
    assert (tmp_path / "again.gguf").read_bytes() == matrix.read_bytes()


def test_important_weights_lose_less(plain: Path, matrix: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    before = tensors_of(plain, importance_matrix.read(matrix))
    lost = {}
    for name, chosen in (("with", matrix), ("without", None)):
        quantize.quantize_file(plain, tmp_path / name, "Q2_K", tmp_path / "log", reporter, chosen)
        after = tensors_of(tmp_path / name, before)
        lost[name] = {
            weight: float((columns * (after[weight] - before[weight]) ** 2).mean())
            for weight, columns in importance_matrix.read(matrix).items()
        }
    assert lost["with"].keys() == lost["without"].keys() and lost["with"]
    assert sum(lost["with"].values()) < 0.8 * sum(lost["without"].values())
    assert all(lost["with"][name] < 1.05 * lost["without"][name] for name in lost["with"])


def tensors_of(path: Path, names: Container[str]) -> dict[str, np.ndarray]:
    """Those tensors of a GGUF, in fp32."""
    import gguf

    found = (each for each in gguf.GGUFReader(path).tensors if each.name in names)
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in found}


def test_some_quantizations_need_a_matrix(plain: Path, matrix: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    with pytest.raises(ToolchainError, match="imatrix"):
        quantize.quantize_file(plain, tmp_path / "IQ2", "IQ2_XXS", tmp_path / "log", reporter)
    assert not (tmp_path / "IQ2").exists()
    quantize.quantize_file(plain, tmp_path / "IQ2", "IQ2_XXS", tmp_path / "log", reporter, matrix)
    assert (tmp_path / "IQ2").is_file()


def test_each_expert_has_its_own_sums() -> None:
    matrix = importance_matrix.Matrix()
    matrix.add("blk.0.ffn_up_exps.weight", 3, np.array([0, 2, 2]), np.array([[1.0, 2.0], [3.0, 0.0], [1.0, 4.0]]))
    matrix.add("blk.0.ffn_up_exps.weight", 3, np.array([0]), np.array([[1.0, 0.0]]))
    assert matrix.sums["blk.0.ffn_up_exps.weight"].tolist() == [[2, 4], [0, 0], [10, 16]]
    assert matrix.counts["blk.0.ffn_up_exps.weight"].tolist() == [2, 0, 2]


def test_an_expert_without_inputs_has_equal_columns(tmp_path: Path) -> None:
    matrix = importance_matrix.Matrix()
    matrix.add("blk.0.ffn_up_exps.weight", 2, np.array([0, 0]), np.array([[1.0, 2.0], [3.0, 0.0]]))
    matrix.write(tmp_path / "matrix", 1)
    assert importance_matrix.read(tmp_path / "matrix")["blk.0.ffn_up_exps.weight"].tolist() == [5, 2, 1, 1]


def test_other_files_are_refused(tmp_path: Path) -> None:
    import gguf

    (tmp_path / "junk").write_bytes(b"junk")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path / "junk", tmp_path / "other.gguf"):
        with pytest.raises(ArtifactError, match="not an importance matrix"):
            importance_matrix.read(path)
    matrix = importance_matrix.Matrix()
    with pytest.raises(ArtifactError, match="nothing finite"):
        matrix.write(tmp_path / "nothing", 1)
    matrix.add("blk.0.attn_q.weight", 1, np.array([0]), np.array([[np.nan]]))
    with pytest.raises(ArtifactError, match="nothing finite"):
        matrix.write(tmp_path / "nothing", 1)


def test_chats_are_chosen_evenly_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importance_matrix.chosen_sequences([0, 10, 20, 30]) == [0, 1, 2]
    monkeypatch.setattr(importance_matrix, "MOST_TOKENS", 50)
    assert importance_matrix.chosen_sequences([10 * each for each in range(11)]) == [0, 2, 4, 6, 8]
    assert importance_matrix.chosen_sequences([0, 1000]) == [0]
    assert [importance_matrix.tokens_read(*each) for each in ((40, 3), (1000, 100), (1000, 2))] == [40, 50, 500]


def test_another_tensor_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = ggml.Tensor(name=b"blk.0.attn_q.weight")
    assert ggml.tensor_at(ctypes.addressof(tensor)).name == b"blk.0.attn_q.weight"
    monkeypatch.setattr(ggml.Tensor, "name", property(lambda _: b"another"), raising=True)
    with pytest.raises(ToolchainError, match="layout"):
        ggml.tensor_at(ctypes.addressof(tensor))
