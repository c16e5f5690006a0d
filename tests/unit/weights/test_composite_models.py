"""Tuning the language model of a composite model: what is found, trained, merged and converted, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.composites import COMPOSITES, tiny_composite
from support.training import TrainingFolder, random_chats, write_tokens

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.engines.native import training
from kolotune.fidelity.reference_model import LayeredModel, WholeModel
from kolotune.fidelity.tasks import ComparedChat
from kolotune.foundation.errors import ModelError, SpaceError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf.convert import convert_adapter
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.stages import merge
from kolotune.weights import composite_models
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.model_config import ModelConfig, read_model_config
from kolotune.weights.model_shape import AdapterShape, read_shape
from kolotune.weights.weight_files import weight_files

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PREFIXES = {
    "gemma3": "language_model.model.",
    "qwen2_5_vl": "model.",
    "qwen3_vl": "model.language_model.",
    "mistral3": "language_model.model.",
    "smolvlm": "model.text_model.",
}


def _trained(root: Path, family: str, vocabulary: int = 96) -> TrainingFolder:
    tiny_composite(root / "base", family, vocabulary)
    composite_models.check(root / "base")
    write_tokens(root / "data" / "train.safetensors", random_chats(4, 1))
    folder = TrainingFolder(root)
    training.train(folder.job(learning_rate=2e-2))
    return folder


@pytest.mark.parametrize("family", COMPOSITES)
def test_the_language_model_is_trained_and_the_rest_stays(family: str, tmp_path: Path, reporter: PlainReporter) -> None:
    job = _trained(tmp_path, family).job()
    base, adapter, merged = Path(job.base_model), Path(job.adapter), tmp_path / "merged"
    shapes = {name: entry.shape for name, entry in MappedTensors(weight_files(base)).entries.items()}
    prefix = composite_models.language_prefix(shapes, read_model_config(base))
    assert prefix == PREFIXES[family]
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    merged.mkdir()
    merge.merge_adapter(adapter, base, merged, tokenizer=base, dtype="fp32", reporter=reporter)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys() and (merged / "preprocessor_config.json").is_file()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name.split(".")[-2] for name in changed} == set(LINEAR) and len(changed) == 2 * len(LINEAR)
    assert all(name.startswith(prefix) for name in changed)
    assert AdapterShape.of(read_shape(base), job.lora_rank, ["all-linear"]).matrices == 2 * len(changed)

    # PEFT's model, the merged one and the reference of the comparison compute the same.
    library: Any = transformers
    ids = torch.randint(6, 90, (1, 24))
    reference, reread = WholeModel(base), WholeModel(merged)
    reference.add(adapter)
    loaded = peft.PeftModel.from_pretrained(library.AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name and "vision" in name]
    with torch.no_grad():
        untrained = WholeModel(base).model(input_ids=ids).logits
        wanted = reference.model(input_ids=ids).logits
        assert (wanted - untrained).abs().max() > 0.05
        for model in (reread.model, loaded):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPOSITES)
def test_the_gguf_is_the_language_model(family: str, tmp_path: Path, reporter: PlainReporter) -> None:
    tokenizer, base = packaged_model.unpack(reporter), tmp_path / "base"
    job = _trained(tmp_path, family, vocabulary=49152).job()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, base / name)
    adapter, target = Path(job.adapter), tmp_path / "tuned.gguf"
    facts = convert_adapter(
        adapter, base, base, dtype="fp32", name="tuned", target=target, log=tmp_path / "log", reporter=reporter
    )
    assert facts["streamed"] is True
    ids = torch.randint(6, 49000, (60,)).tolist()
    chat = ComparedChat(ids, list(range(60)), [])
    model = WholeModel(base)
    untrained = _normalised(next(model.log_probabilities([chat]))[1])
    model.add(adapter)
    wanted = _normalised(next(model.log_probabilities([chat]))[1])
    gguf = ExactGguf(target, 64)
    served = _normalised(gguf.log_probabilities(ids, chat.positions))
    gguf.close()
    assert (np.exp(wanted) * (wanted - untrained)).sum(axis=1).mean() > 1e-2
    assert (np.exp(wanted) * (wanted - served)).sum(axis=1).mean() < 1e-6


def _normalised(values: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float64)
    return exact - np.logaddexp.reduce(exact, axis=1)[:, None]


def test_settings_of_the_language_model_may_be_at_the_root_as_in_qwens_files(tmp_path: Path) -> None:
    tiny_composite(tmp_path, "qwen2_5_vl")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    text = config.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}), encoding="utf-8")
    composite_models.check(tmp_path)
    assert {linear.name.split(".")[0] for linear in read_shape(tmp_path).linears} == {"model"}
    assert len(read_shape(tmp_path).linears) == 2 * len(LINEAR)


def test_a_part_without_the_language_models_layers_is_refused(tmp_path: Path) -> None:
    tiny_composite(tmp_path, "gemma3")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "layers.1." not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ModelError, match="no parts of its weights are a language model of 2 layers"):
        composite_models.check(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    tiny_composite(tmp_path, "qwen3_vl")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no weight that is transformers' model\.language_model\.layers\.1\.mlp\.up"):
        composite_models.check(tmp_path)


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    tiny_composite(tmp_path, "mistral3")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}), encoding="utf-8")
    with pytest.raises(ModelError, match="transformers can't make this composite model"):
        composite_models.check(tmp_path)


def test_two_language_models_are_refused() -> None:
    config = ModelConfig(Path("base/config.json"), {"text_config": {"num_hidden_layers": 1, "hidden_size": 8}})
    shapes = {
        f"{prefix}{leaf}": (8, 8) for prefix in ("one.", "two.") for leaf in ("layers.0.x", "embed_tokens.weight")
    }
    with pytest.raises(ModelError, match="2 parts"):
        composite_models.language_prefix(shapes, config)


def test_a_plain_model_is_its_own_language_model(tmp_path: Path, tiny_model: Any) -> None:
    model = tiny_model("llama", tmp_path)
    composite_models.check(tmp_path)
    assert composite_models.language_module(model) == ("", model)
    assert not composite_models.is_composite(read_model_config(tmp_path))


def test_a_composite_model_is_read_layer_by_layer_only_under_its_own_names(tmp_path: Path) -> None:
    tiny_composite(tmp_path / "own", "qwen3_vl")
    tiny_composite(tmp_path / "other", "gemma3")
    chat = ComparedChat(list(range(6, 30)), [3, 7], [])
    whole, layered = WholeModel(tmp_path / "own"), LayeredModel(tmp_path / "own")
    wanted, read = next(whole.log_probabilities([chat]))[1], next(layered.log_probabilities([chat]))[1]
    np.testing.assert_allclose(read, wanted, atol=1e-4)
    with pytest.raises(SpaceError, match="can't be read layer by layer"):
        LayeredModel(tmp_path / "other")
