"""Make a model folder of a Llama's GGUF in Q4_1, byte by byte as transformers would save it in bf16.

transformers does that, too, but reads the header three times with a reader that makes objects of every token, and
makes its table of names anew for each module: 40 seconds, of which the weights take 5.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.weights.dtypes import from_f32
from kolotune.weights.gguf_metadata import MetadataReader
from kolotune.weights.safetensors_header import Entry
from kolotune.weights.shards import split_into_shards, write_shards

if TYPE_CHECKING:
    import numpy as np

_ALIGNMENT = 32
_CONTROL = 3  # the type of a special token
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_NAMES_IN_LAYERS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}


def unpack(gguf: Path, target: Path) -> None:
    """Write weights, config and tokenizer.

    Args:
        gguf: of a Llama with tied embeddings, whose tokenizer splits digits; it is trusted.
        target: the folder to make.
    """
    target.mkdir()
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _GgufReader(data)
        entries = sorted((Entry(name, "BF16", shape) for name, shape in reader.shapes()), key=lambda entry: entry.name)
        write_shards(target, split_into_shards(entries), reader.values)
        for name, values in _configs(reader.fields).items():
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            (target / name).write_text(text, encoding="utf-8", newline="")
        _save_tokenizer(reader, target)


class _GgufReader(MetadataReader):
    """The tensors of the GGUF under transformers' names."""

    def __init__(self, data: mmap.mmap) -> None:
        super().__init__(data)
        self._file = data
        self._tensors = self.distinct(self.tensor_count, lambda _: self._tensor())
        self._start = -(-self.position // _ALIGNMENT) * _ALIGNMENT
        self._stored = {_name(stored): stored for stored in self._tensors}

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Return shape, slowest dimension first, number of the type, and offset."""
        shape = tuple(self.integer("<Q") for _ in range(self.integer("<I")))[::-1]
        return shape, self.integer("<I"), self.integer("<Q")

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and the shape of each weight."""
        for name, stored in self._stored.items():
            yield name, self._tensors[stored][0]

    def values(self, entry: Entry) -> Iterator[np.ndarray]:
        """Yield a weight's values as the bits of bf16, uint16, in one piece."""
        import gguf
        import numpy as np

        stored = self._stored[entry.name]
        shape, number, offset = self._tensors[stored]
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block * size
        rows = np.frombuffer(self._file[self._start + offset :][:count], np.uint8).reshape(*shape[:-1], -1)
        weight = gguf.dequantize(rows.view(np.float32) if block == 1 else rows, kind).reshape(shape)
        heads = self.fields.get(_HEADS.get(stored.split(".")[-2], ""))
        if isinstance(heads, int):  # llama.cpp turns pairs of neighbours, transformers halves
            weight = weight.reshape(heads, -1, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
        yield from_f32(np.ascontiguousarray(weight), entry.dtype)


def _name(stored: str) -> str:
    first, *others = stored.removesuffix(".weight").split(".")
    if not others:
        return f"{_NAMES[first]}.weight"
    layer, matrix = others
    return f"model.layers.{layer}.{_NAMES_IN_LAYERS[matrix]}.weight"


def _configs(fields: dict[str, Any]) -> dict[str, dict[str, object]]:
    """Return the contents of config.json and generation_config.json."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    tokens = {
        f"{ours}_token_id": fields[f"tokenizer.ggml.{name}_token_id"]
        for ours, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    version = {"transformers_version": importlib.metadata.version("transformers"), "use_cache": True}
    config = {
        "_model_name_or_path": fields["general.name"],
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pretraining_tp": 1,
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": llama["rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "unk_token_id": fields["tokenizer.ggml.unknown_token_id"],
        "vocab_size": llama["vocab_size"],
    }
    generation = {"_from_model_config": True, "output_attentions": False, "output_hidden_states": False}
    return {"config.json": config | tokens | version, "generation_config.json": generation | tokens | version}


def _save_tokenizer(reader: _GgufReader, target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    fields: dict[str, Any] = reader.fields
    texts = [str(token) for token in reader.array("tokenizer.ggml.tokens")]
    types = reader.array("tokenizer.ggml.token_type")
    halves = [str(merge).partition(" ") for merge in reader.array("tokenizer.ggml.merges")]
    ids = {text: number for number, text in enumerate(texts)}
    # As transformers has them of a GGUF: no prefix and no suffix are texts of no letters there.
    model = models.BPE(
        ids, [(left, right) for left, _, right in halves], continuing_subword_prefix="", end_of_word_suffix=""
    )
    tokenizer: Any = Tokenizer(model)
    # A GGUF does not contain SmolLM2's digit splitter; without it llama.cpp would see other ids.
    digits, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    special = [text for text, kind in zip(texts, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.save(str(target / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = {f"{ours}_token": texts[fields[f"tokenizer.ggml.{name}_token_id"]] for ours, name in names.items()}
    config = {
        "backend": "tokenizers",
        "is_local": True,
        "local_files_only": False,
        "model_max_length": int(1e30),
        "tokenizer_class": "TokenizersBackend",
    }
    text = json.dumps(dict(sorted((config | tokens).items())), indent=2) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="")
    (target / "chat_template.jinja").write_text(str(fields["tokenizer.chat_template"]), encoding="utf-8", newline="")
