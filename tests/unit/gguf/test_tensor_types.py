"""Which type each tensor gets, compared with what llama.cpp chose for tiny models of many architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.quantizing import MODELS, chosen_types, recorded_choices

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES, NEEDS_IMPORTANCE_MATRIX, WHOLE_BLOCKS_ONLY
from kolotune.gguf import header
from kolotune.gguf.tensor_types import needs_matrix, tensor_types


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_that_llama_cpp_chose(name: str, tmp_path: Path) -> None:
    summary = header.read(MODELS[name].write(tmp_path / "model.gguf", "f16"))
    recorded, chosen = recorded_choices()[name], chosen_types(summary)
    assert recorded.keys() == chosen.keys()
    for case, choices in chosen.items():
        assert choices == recorded[case], case


def test_every_file_type_is_recorded() -> None:
    assert recorded_choices().keys() == MODELS.keys()
    cases = {case.partition(" ")[0] for choices in recorded_choices().values() for case in choices}
    assert cases == FILE_TYPES.keys()


def test_rows_of_few_columns_fit_no_block(tmp_path: Path) -> None:
    summary = header.read(MODELS["100 columns"].write(tmp_path / "model.gguf", "bf16"))
    assert set(tensor_types(summary, "Q4_K_M", has_matrix=False).values()) == {"F32", "F16"}
    for name in WHOLE_BLOCKS_ONLY:
        with pytest.raises(ToolchainError, match="100 columns"):
            tensor_types(summary, name, has_matrix=False)


def test_which_quantizations_need_a_matrix(tmp_path: Path) -> None:
    """The table for options says what the rules say of a Llama whose rows are whole blocks."""
    summary = header.read(MODELS["llama"].write(tmp_path / "model.gguf", "f16"))
    needing = {
        name
        for name in FILE_TYPES
        for tensor, kind in tensor_types(summary, name, has_matrix=False).items()
        if needs_matrix(tensor, kind, name)
    }
    assert needing == NEEDS_IMPORTANCE_MATRIX
    assert not needs_matrix("token_embd.weight", "IQ2_XS", "IQ2_XS")
    assert not needs_matrix("blk.0.attn_q.weight", "Q2_K", "Q2_K")
