"""Which type each tensor gets in a quantization: llama.cpp's rules, as tables.

A file type such as Q4_K_M is a mixture. Most tensors get its base type; those that quality depends on get a wider one,
by their role, their layer, and a few traits of the model. The first of the `_RULES` for the role that fits a tensor
decides. The rules are those of ``llama-quant.cpp`` in the llama.cpp of llama-cpp-python 0.3.36; slow tests compare the
choices and the files with that version's own quantizer. See docs/quantizer.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from kolotune.foundation.errors import ToolchainError

from . import header, writer_form
from .header import GgufSummary, GgufTensor


class Role(StrEnum):
    """What a tensor does in the model."""

    OUTPUT = "output"
    EMBEDDING = "embedding"
    QUERIES = "queries"
    KEYS = "keys"
    VALUES = "values"
    ATTENTION_OUTPUT = "attention output"
    UP = "up"
    GATE = "gate"
    DOWN = "down"
    OTHER = "other"


_OUTPUT = "output.weight"
_ROLES_BY_NAME = {
    _OUTPUT: Role.OUTPUT,
    "token_embd.weight": Role.EMBEDDING,
    "per_layer_token_embd.weight": Role.EMBEDDING,
}
_ROLES_BY_PART = {
    "attn_qkv.weight": Role.VALUES,  # as precise as its most sensitive part
    "attn_kv_b.weight": Role.VALUES,
    "attn_v.weight": Role.VALUES,
    "attn_k.weight": Role.KEYS,
    "attn_q.weight": Role.QUERIES,
    "attn_output.weight": Role.ATTENTION_OUTPUT,
    "ffn_up": Role.UP,
    "ffn_gate": Role.GATE,
    "ffn_down": Role.DOWN,
}
_FEED_FORWARD = (Role.UP, Role.GATE, Role.DOWN)
_NEVER_QUANTIZED = ("position_embd.weight", "token_types.weight")
# Small, or read without a matrix product: these keep their type whatever their shape.
_NEVER_QUANTIZED_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_GLM5_NEVER_QUANTIZED_PARTS = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
_GLM5_Q8_PARTS = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
_GLM5, _FALCON, _BAILING = "glm5-next", "falcon", "bailingmoe3"

_BASE_TYPES = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0", "Q1_0": "Q1_0", "Q2_0": "Q2_0",
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS", "BF16": "BF16", "MXFP4_MOE": "MXFP4",
}  # fmt: skip
_UNQUANTIZED = ("F32", "F16", "BF16")
# For rows that are not whole blocks of a type; what fits neither becomes F16.
_TYPES_OF_SHORTER_BLOCKS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_SHORTEST_BLOCK = 32
_TYPES_THAT_NEED_A_MATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_HINT = "Choose another quantization."
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class _Model:
    """What the rules ask about a model.

    Attributes:
        architecture: such as "llama".
        layers: their number.
        experts: of each layer; 0 in dense models.
        heads_per_key: how many attention heads share a key-value head; 0 without attention.
        is_70b: whether llama.cpp counts it among the 70B models, whose values are wider.
        is_tied: whether the embedding is the output, too.
    """

    architecture: str
    layers: int
    experts: int
    heads_per_key: int
    is_70b: bool
    is_tied: bool


@dataclass(frozen=True)
class _Case:
    """A tensor that a rule may fit.

    Attributes:
        model: that it belongs to.
        position: its layer, or how many tensors of its role come before it.
        total: number of layers, or of tensors of its role.
        has_matrix: whether the model is quantized with an importance matrix.
    """

    model: _Model
    position: int
    total: int
    has_matrix: bool


_Condition = Callable[[_Case], bool]


def _always(_: _Case) -> bool:
    return True


def _in_first(share: int) -> _Condition:
    return lambda case: case.position < case.total // share


def _in_middle(case: _Case) -> bool:
    return case.total // 8 <= case.position < 7 * case.total // 8


def _gets_more_bits(case: _Case) -> bool:
    """Whether it is in the first or last eighth, or is each third tensor between."""
    eighth = case.total // 8
    return not _in_middle(case) or (case.position - eighth) % 3 == 2


def _shares_keys(case: _Case) -> bool:
    return case.model.heads_per_key >= 4


def _has_8_experts(case: _Case) -> bool:
    return case.model.experts == 8


def _is_falcon(case: _Case) -> bool:
    return case.model.architecture == _FALCON


def _has_matrix(case: _Case) -> bool:
    return case.has_matrix


def _not(condition: _Condition) -> _Condition:
    return lambda case: not condition(case)


def _both(*conditions: _Condition) -> _Condition:
    return lambda case: all(condition(case) for condition in conditions)


def _either(*conditions: _Condition) -> _Condition:
    return lambda case: any(condition(case) for condition in conditions)


@dataclass(frozen=True)
class _Rule:
    """In these file types (separated by spaces), a tensor that fits the condition gets this type."""

    file_types: str
    type: str
    when: _Condition = _always


_ALL = " ".join(_BASE_TYPES)
_SMALLEST = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
_COUNTED = (*_SMALLEST.split(), "MXFP4_MOE")  # with experts, others ask a tensor's name for its layer
_RULES: Mapping[Role, tuple[_Rule, ...]] = {
    Role.OUTPUT: (
        _Rule("Q8_0 MXFP4_MOE", "Q8_0"),
        _Rule(_ALL, "Q8_0", _is_falcon),
        _Rule(f"{_SMALLEST} IQ3_XXS", "Q5_K"),
        _Rule(_ALL, "Q6_K"),
    ),
    Role.EMBEDDING: (
        _Rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
        _Rule("IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
        _Rule("TQ1_0 TQ2_0 Q2_0", "Q4_K"),
    ),
    Role.QUERIES: (
        _Rule("IQ3_XS", "IQ3_XXS"),
        _Rule("IQ3_XXS", "IQ2_S"),
    ),
    Role.KEYS: (
        _Rule(_SMALLEST, "Q4_K", _has_8_experts),
        _Rule(_ALL, "Q8_0", _has_8_experts),
        _Rule("IQ3_XS", "IQ3_XXS"),
        _Rule("IQ3_XXS", "IQ2_S"),
    ),
    Role.VALUES: (
        _Rule(_SMALLEST, "Q4_K", _either(_shares_keys, lambda case: case.model.experts >= 4)),
        _Rule("IQ2_S IQ2_M", "IQ3_S"),
        _Rule(_SMALLEST, "Q2_K"),
        _Rule(_ALL, "Q8_0", _has_8_experts),
        _Rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "Q4_K", _shares_keys),
        _Rule("Q2_K", "Q3_K"),
        _Rule("IQ3_XXS", "IQ3_S", _not(_has_matrix)),
        _Rule("IQ3_M", "Q4_K"),
        _Rule("Q3_K_M", "Q5_K", lambda case: case.position < 2),
        _Rule("Q3_K_M", "Q4_K"),
        _Rule("Q3_K_L", "Q5_K"),
        _Rule("IQ4_NL IQ4_XS", "Q5_K", _shares_keys),
        _Rule("Q4_K_M Q5_K_M", "Q6_K", _gets_more_bits),
        _Rule("Q4_K_S", "Q5_K", lambda case: case.position < 4),
    ),
    Role.ATTENTION_OUTPUT: (
        _Rule(_SMALLEST, "Q5_K", _has_8_experts),
        _Rule("IQ1_S IQ1_M", "IQ2_XXS"),
        _Rule("IQ2_S IQ2_M", "IQ3_S"),
        _Rule("Q3_K_L", "Q4_K", _is_falcon),
        _Rule(
            "Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS",
            "Q5_K",
            _both(_has_8_experts, _not(_is_falcon)),
        ),
        _Rule("Q2_K", "Q3_K", _not(_either(_has_8_experts, _is_falcon))),
        _Rule("IQ3_XXS", "IQ3_S", _not(_either(_has_8_experts, _is_falcon))),
        _Rule("Q3_K_M IQ3_M", "Q4_K", _not(_either(_has_8_experts, _is_falcon))),
        _Rule("Q3_K_L", "Q5_K", _not(_either(_has_8_experts, _is_falcon))),
    ),
    Role.DOWN: (
        _Rule("IQ2_S IQ2_M", "IQ3_S", _in_first(8)),
        _Rule(_SMALLEST, "Q2_K", _in_first(8)),
        _Rule("Q2_K", "Q3_K"),
        _Rule("Q2_K_S", "Q4_K", _in_first(8)),
        _Rule("IQ3_XXS", "Q4_K", _both(_in_first(8), _not(_has_matrix))),
        _Rule("IQ3_XXS", "Q3_K", _not(_has_matrix)),
        _Rule("IQ3_M", "Q4_K", _either(_in_first(8), _both(_has_8_experts, _gets_more_bits))),
        _Rule("Q3_K_M", "Q5_K", _in_first(16)),
        _Rule("Q3_K_M", "Q4_K", _either(_not(_is_falcon), _gets_more_bits)),
        _Rule("Q3_K_L", "Q4_K", _is_falcon),
        _Rule("Q3_K_L", "Q5_K"),
        _Rule("Q4_K_S", "Q5_K", _both(_in_first(8), _not(_is_falcon))),
        _Rule("Q4_K_M", "Q6_K", _both(_in_first(16), _is_falcon)),
        _Rule("Q4_K_M", "Q5_K", _both(_gets_more_bits, _is_falcon)),
        _Rule("Q4_K_M Q5_K_M", "Q6_K", _both(_gets_more_bits, _not(_is_falcon))),
        _Rule("Q5_K_M", "Q6_K", _gets_more_bits),
        _Rule("IQ4_NL IQ4_XS", "Q5_K", _both(_in_first(8), _not(_has_matrix))),
        _Rule("Q4_0", "Q4_1", _both(_in_first(8), _has_matrix)),
        _Rule("Q5_0", "Q5_1", _both(_in_first(8), _has_matrix)),
    ),
    Role.UP: (_Rule("IQ3_XS", "IQ3_XXS", _in_middle),),
    Role.GATE: (_Rule("IQ3_XS", "IQ3_XXS", _in_middle),),
}
_70B_VALUES = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}


def tensor_types(
    summary: GgufSummary, file_type: str, *, has_matrix: bool, chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the type that each tensor of an unquantized GGUF gets.

    Args:
        summary: of the GGUF.
        file_type: name of the quantization.
        has_matrix: whether it is made with an importance matrix.
        chosen: types that replace the rules (see `type_choices`): other tensors keep theirs; None: by the rules.

    Returns:
        Names of types by the names of the tensors, in the order in which they are written.

    Raises:
        ToolchainError: llama.cpp has no type for a tensor.
    """
    model = _model_of(summary)
    names = sorted(summary.tensors, key=writer_form.position)
    if chosen is not None:
        return {name: chosen.get(name, summary.tensors[name].type) for name in names}
    value_count = sum(_role_of(name) is Role.VALUES for name in names)
    seen: Counter[Role] = Counter()
    types = {}
    for name in names:
        tensor = summary.tensors[name]
        types[name] = tensor.type
        if not _is_quantized(name, tensor, model):
            continue
        role = _role_of(name)
        base = _BASE_TYPES[file_type]
        if base not in _UNQUANTIZED:
            position, total = seen[role], value_count if role is Role.VALUES else model.layers
            if model.experts > 1 and role in _FEED_FORWARD and file_type not in _COUNTED:
                position = _layer_of(name, model)
            seen[role] += 1
            case = _Case(model, position, total, has_matrix)
            base = _whole_block_type(name, tensor, _chosen_type(name, tensor, role, file_type, case))
        types[name] = base
    return types


def needs_matrix(name: str, tensor_type: str, file_type: str) -> bool:
    """Whether a tensor of this name can't be quantized to a type without its importance matrix."""
    if _role_of(name) in (Role.OUTPUT, Role.EMBEDDING):
        return False
    return tensor_type in _TYPES_THAT_NEED_A_MATRIX or (tensor_type, file_type) == ("Q2_K", "Q2_K_S")


def quantized_tensors(summary: GgufSummary) -> list[str]:
    """Return the tensors that are quantized at all, in the order in which they are written."""
    model = _model_of(summary)
    names = sorted(summary.tensors, key=writer_form.position)
    return [name for name in names if _is_quantized(name, summary.tensors[name], model)]


def is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding of tokens."""
    return _role_of(name) is Role.EMBEDDING


def _role_of(name: str) -> Role:
    if name in _ROLES_BY_NAME:
        return _ROLES_BY_NAME[name]
    return next((role for part, role in _ROLES_BY_PART.items() if part in name), Role.OTHER)


def _is_quantized(name: str, tensor: GgufTensor, model: _Model) -> bool:
    parts = _NEVER_QUANTIZED_PARTS + (_GLM5_NEVER_QUANTIZED_PARTS if model.architecture == _GLM5 else ())
    return (
        len(writer_form.significant(tensor.shape[::-1])) > 1
        and name.endswith("weight")
        and name not in _NEVER_QUANTIZED
        and not any(part in name for part in parts)
    )


def _chosen_type(name: str, tensor: GgufTensor, role: Role, file_type: str, case: _Case) -> str:
    """Return the type by the rules, before it is asked whether its blocks fit."""
    base, model = _BASE_TYPES[file_type], case.model
    if model.architecture == _GLM5 and any(part in name for part in _GLM5_Q8_PARTS):
        return "Q8_0"
    if role is Role.EMBEDDING and model.is_tied:
        role = Role.OUTPUT
    if role is Role.OUTPUT:
        if tensor.shape[0] % header.block_of(base)[0]:
            return "Q8_0"
    elif file_type == "MXFP4_MOE":
        has_experts = len(tensor.shape) > 2 and tensor.shape[2] > 1
        if model.architecture == _BAILING:  # its projections of latent attention are stacked, too
            has_experts = has_experts and role in _FEED_FORWARD
        return "MXFP4" if has_experts else "Q8_0"
    rules = (rule for rule in _RULES.get(role, ()) if file_type in rule.file_types.split())
    chosen = next((rule.type for rule in rules if rule.when(case)), base)
    if role is Role.VALUES and model.is_70b and file_type not in _SMALLEST.split():
        return _70B_VALUES.get(chosen, chosen)
    return chosen


def _whole_block_type(name: str, tensor: GgufTensor, chosen: str) -> str:
    """Return the type, or one of shorter blocks if the tensor's rows are not whole blocks of it."""
    columns, (block, _) = tensor.shape[0], header.block_of(chosen)
    if columns % block == 0:
        return chosen
    if chosen not in _TYPES_OF_SHORTER_BLOCKS and block > _SHORTEST_BLOCK:
        raise ToolchainError(
            f"{name}: {columns} columns are no multiple of {block}, and {chosen} has no replacement", _HINT
        )
    replacement = _TYPES_OF_SHORTER_BLOCKS.get(chosen, chosen)
    return "F16" if columns % header.block_of(replacement)[0] else replacement


def _layer_of(name: str, model: _Model) -> int:
    layer = _LAYER.match(name)
    if layer is None or int(layer[1]) >= model.layers:
        raise ToolchainError(f"{name} belongs to none of the model's {model.layers} layers", _HINT)
    return int(layer[1])


def _model_of(summary: GgufSummary) -> _Model:
    architecture = summary.architecture

    def number(field: str, default: int = 0) -> int:
        return summary.integer(f"{architecture}.{field}", default)

    layers = number("block_count")
    real_layers = layers - number("nextn_predict_layers")
    heads = summary.first_integer(f"{architecture}.attention.head_count", 0)
    key_heads = summary.first_integer(f"{architecture}.attention.head_count_kv", heads)
    is_70b = real_layers == {"jais2": 68}.get(architecture, 80) and (
        architecture in ("qwen2", "deci", "olmo", "jais2")
        or (architecture in ("llama", "llama-embed") and heads != key_heads)
    )
    if architecture == "nanbeige":  # its layers are computed several times
        layers *= number("num_loops", 1)
    if architecture == "graniteswitch":  # its router counts as one
        layers = real_layers + 1
    heads_per_key = heads // key_heads if key_heads else 0
    return _Model(architecture, layers, number("expert_count"), heads_per_key, is_70b, _OUTPUT not in summary.tensors)
