"""llama.cpp's C functions and structures, as far as they are used, declared for `ctypes`.

A structure that is declared wrongly would be read and written at wrong places. So `load` proves each one with the
library's own functions that fill it, whose values are known. Only the leading fields are declared; what other versions
have behind them is spare space.
"""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError

_SPARE = 128  # bytes
_TOKENS = (8, 5, 11)  # of the batches by which their structure is proven: freed memory may look like one of them
_Q4_K = 12  # ggml's number of a type whose traits are known
_POINTER, _INT, _INT32, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_size_t
_TEXT, _FLOAT, _BOOL, _UINT32 = ctypes.c_char_p, ctypes.c_float, ctypes.c_bool, ctypes.c_uint32
F32 = 0
"""ggml's number of the type fp32."""
NO_FLASH_ATTENTION = 0
"""llama.cpp's number for attention as it is defined."""

READ_WHOLE = 0
"""llama.cpp's number for reading a file rather than mapping it."""

LogCallback = ctypes.CFUNCTYPE(None, _INT, _TEXT, _POINTER)
EvaluationCallback = ctypes.CFUNCTYPE(_BOOL, _POINTER, _BOOL, _POINTER)


class ModelParameters(ctypes.Structure):
    """``struct llama_model_params``."""

    C_NAME = "llama_model_params"
    _fields_ = (
        ("devices", _POINTER),
        ("tensor_buft_overrides", _POINTER),
        ("n_gpu_layers", _INT32),
        ("split_mode", _INT),
        ("load_mode", _INT),
        ("lazy_mode", _INT),
        ("main_gpu", _INT32),
        ("tensor_split", _POINTER),
        ("progress_callback", _POINTER),
        ("progress_callback_user_data", _POINTER),
        ("kv_overrides", _POINTER),
        ("vocab_only", _BOOL),
        ("check_tensors", _BOOL),
        ("use_extra_bufts", _BOOL),
        ("no_host", _BOOL),
        ("no_alloc", _BOOL),
        ("spare", ctypes.c_char * _SPARE),
    )


class ContextParameters(ctypes.Structure):
    """``struct llama_context_params``."""

    C_NAME = "llama_context_params"
    _fields_ = (
        ("n_ctx", _UINT32),
        ("n_batch", _UINT32),
        ("n_ubatch", _UINT32),
        ("n_seq_max", _UINT32),
        ("n_rs_seq", _UINT32),
        ("n_outputs_max", _UINT32),
        ("n_outputs_max_per_seq", _UINT32),
        ("n_threads", _INT32),
        ("n_threads_batch", _INT32),
        ("ctx_type", _INT),
        ("rope_scaling_type", _INT),
        ("pooling_type", _INT),
        ("attention_type", _INT),
        ("flash_attn_type", _INT),
        ("rope_freq_base", _FLOAT),
        ("rope_freq_scale", _FLOAT),
        ("yarn_ext_factor", _FLOAT),
        ("yarn_attn_factor", _FLOAT),
        ("yarn_beta_fast", _FLOAT),
        ("yarn_beta_slow", _FLOAT),
        ("yarn_orig_ctx", _UINT32),
        ("defrag_thold", _FLOAT),
        ("cb_eval", _POINTER),
        ("cb_eval_user_data", _POINTER),
        ("type_k", _INT),
        ("type_v", _INT),
        ("spare", ctypes.c_char * _SPARE),
    )


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    C_NAME = "llama_batch"
    _fields_ = (
        ("n_tokens", _INT32),
        ("token", ctypes.POINTER(_INT32)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_INT32)),
        ("n_seq_id", ctypes.POINTER(_INT32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``."""

    C_NAME = "ggml_type_traits"
    _fields_ = (
        ("type_name", _TEXT),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", _SIZE),
        ("is_quantized", _BOOL),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, ctypes.c_int64)),
    )


# What the library's own functions fill in, where it is not zero.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
}  # fmt: skip

_SIGNATURES: dict[str, tuple[Any, ...]] = {  # by name: the result, then the arguments
    "llama_backend_init": (None,),
    "llama_log_set": (None, LogCallback, _POINTER),
    "llama_print_system_info": (_TEXT,),
    "llama_flash_attn_type_name": (_TEXT, _INT),
    "llama_load_mode_name": (_TEXT, _INT),
    "llama_model_default_params": (ModelParameters,),
    "llama_model_load_from_file": (_POINTER, _TEXT, ModelParameters),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_model_chat_template": (_TEXT, _POINTER, _TEXT),
    "llama_context_default_params": (ContextParameters,),
    "llama_init_from_model": (_POINTER, _POINTER, ContextParameters),
    "llama_free": (None, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT32, _INT32),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, _BOOL),
    "llama_memory_seq_rm": (_BOOL, _POINTER, _INT32, _INT32, _INT32),
    "llama_batch_init": (Batch, _INT32, _INT32, _INT32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (_INT32, _POINTER, Batch),
    "llama_get_logits_ith": (ctypes.POINTER(_FLOAT), _POINTER, _INT32),
    "llama_vocab_n_tokens": (_INT32, _POINTER),
    "llama_vocab_get_add_bos": (_BOOL, _POINTER),
    "llama_vocab_bos": (_INT32, _POINTER),
    "llama_vocab_eos": (_INT32, _POINTER),
    "llama_vocab_is_eog": (_BOOL, _POINTER, _INT32),
    "llama_vocab_get_text": (_TEXT, _POINTER, _INT32),
    "llama_tokenize": (_INT32, _POINTER, _TEXT, _INT32, ctypes.POINTER(_INT32), _INT32, _BOOL, _BOOL),
    "llama_token_to_piece": (_INT32, _POINTER, _INT32, _TEXT, _INT32, _INT32, _BOOL),
    "ggml_type_name": (_TEXT, _INT),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), _INT),
    "ggml_op_name": (_TEXT, _INT),
    "ggml_get_name": (_TEXT, _POINTER),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_fp16_to_fp32_row": (None, _POINTER, _POINTER, ctypes.c_int64),
    "ggml_bf16_to_fp32_row": (None, _POINTER, _POINTER, ctypes.c_int64),
    "ggml_validate_row_data": (_BOOL, _INT, _POINTER, _SIZE),
    "ggml_quantize_chunk": (_SIZE, _INT, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER),
}  # fmt: skip


@functools.cache
def load() -> Any:
    """Load the library and prove the structures; return an object that has its functions as attributes.

    Raises:
        ToolchainError: it is missing, can't be loaded, or is of a version that is declared differently.
    """
    libraries = shared_libraries.load()
    library = SimpleNamespace()
    for name, (result, *arguments) in _SIGNATURES.items():
        function = shared_libraries.function_in(libraries, name)
        if function is None:
            raise _unfit(f"has no {name}")
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    prove(library)
    return library


def prove(library: Any) -> None:
    """Compare the structures and numbers that are declared here with the library's own.

    Raises:
        ToolchainError: they differ.
    """
    for parameters, defaults in (
        (library.llama_model_default_params(), _MODEL_DEFAULTS),
        (library.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for name, *_ in parameters._fields_:
            value = getattr(parameters, name)
            if name != "spare" and (value or 0) != defaults.get(name, 0):
                raise _unfit(f"has another layout of {parameters.C_NAME}: {name} is {value}")
    batches = [library.llama_batch_init(tokens, 0, 1) for tokens in _TOKENS]
    for tokens, batch in zip(_TOKENS, batches, strict=True):
        arrays = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
        if batch.n_tokens or batch.embd or not all(arrays) or not _ends_after(batch.seq_id, tokens):
            raise _unfit(f"has another layout of {batch.C_NAME}")
    for batch in batches:
        library.llama_batch_free(batch)
    traits = library.ggml_get_type_traits(_Q4_K).contents
    found = (traits.type_name, traits.blck_size, traits.type_size, traits.is_quantized)
    if found != (b"q4_K", 256, 144, True) or not traits.to_float:
        raise _unfit(f"has another layout of {traits.C_NAME}")
    for name, number, text in (
        ("ggml_type_name", F32, b"f32"),
        ("llama_flash_attn_type_name", NO_FLASH_ATTENTION, b"disabled"),
        ("llama_load_mode_name", READ_WHOLE, b"none"),
    ):
        if getattr(library, name)(number) != text:
            raise _unfit(f"has other numbers: {name}")


def _ends_after(pointers: Any, count: int) -> bool:
    """Whether a null pointer comes behind `count` others."""
    return [bool(pointers[number]) for number in range(count + 1)] == [*[True] * count, False]


def _unfit(reason: str) -> ToolchainError:
    return ToolchainError(
        f"{shared_libraries.find().origin} {reason}",
        f"kolotune is made for build {shared_libraries.BUILD} of llama.cpp. Use that one, or unset LLAMA_CPP_DIR.",
    )
