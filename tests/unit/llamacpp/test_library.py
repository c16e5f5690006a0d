"""llama.cpp's functions: declared as the library has them, or refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError
from kolotune.llamacpp import library


@pytest.fixture
def functions() -> SimpleNamespace:
    """A copy of the real functions; declarations may be planted in it."""
    return SimpleNamespace(**vars(library.load()))


def planted(structure: Any, before: str) -> type[ctypes.Structure]:
    """The structure of another version, which has one field more."""
    fields = list(structure._fields_)
    fields.insert([name for name, _ in fields].index(before), ("planted", ctypes.c_void_p))
    return type("Planted", (ctypes.Structure,), {"_fields_": fields, "C_NAME": structure.C_NAME})


def test_the_real_library_is_declared_right(functions: SimpleNamespace) -> None:
    library.prove(functions)
    assert b"CPU" in functions.llama_print_system_info()


@pytest.mark.parametrize(
    ("function", "structure", "field"),
    [
        ("llama_context_default_params", library.ContextParameters, "n_outputs_max_per_seq"),
        ("llama_context_default_params", library.ContextParameters, "attention_type"),
        ("llama_context_default_params", library.ContextParameters, "cb_eval"),
        ("llama_context_default_params", library.ContextParameters, "yarn_attn_factor"),
        ("llama_model_default_params", library.ModelParameters, "devices"),
        ("llama_model_default_params", library.ModelParameters, "lazy_mode"),
        ("llama_model_default_params", library.ModelParameters, "kv_overrides"),
        ("llama_model_default_params", library.ModelParameters, "check_tensors"),
        ("llama_batch_init", library.Batch, "token"),
        ("llama_batch_init", library.Batch, "embd"),
        ("llama_batch_init", library.Batch, "pos"),
    ],
)
def test_another_layout_is_refused(functions: SimpleNamespace, function: str, structure: Any, field: str) -> None:
    original = getattr(functions, function)
    kind = ctypes.CFUNCTYPE(planted(structure, field), *(original.argtypes or ()))
    setattr(functions, function, kind(ctypes.cast(original, ctypes.c_void_p).value))
    with pytest.raises(ToolchainError, match=rf"another layout of {structure.C_NAME}"):
        library.prove(functions)


@pytest.mark.parametrize("name", ["ggml_type_name", "llama_flash_attn_type_name", "llama_load_mode_name"])
def test_other_numbers_are_refused(functions: SimpleNamespace, name: str) -> None:
    original: Callable[[int], bytes] = getattr(functions, name)
    setattr(functions, name, lambda number: original(number + 1))
    with pytest.raises(ToolchainError, match=f"other numbers: {name}"):
        library.prove(functions)


def test_a_library_that_lacks_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def function_in(libraries: tuple[Any, ...], name: str) -> Any:
        return None if name == "llama_decode" else original(libraries, name)

    original = shared_libraries.function_in
    monkeypatch.setattr(shared_libraries, "function_in", function_in)
    with pytest.raises(ToolchainError, match=r"^xllamacpp [\d.]+ has no llama_decode$"):
        library.load.__wrapped__()
