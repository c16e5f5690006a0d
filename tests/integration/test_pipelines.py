"""Whole pipelines, from chats to Modelfiles: every result is there, and each stage has the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import pytest
from safetensors.numpy import load_file
from support.llamacpp_writer import is_kept
from support.ollama_stand_in import OllamaStandIn
from support.reference_training import held_out_loss
from support.runs import STAGES_WITHOUT_COMPARE

from kolotune.chats.tokens.tokenizer import load_tokenizer, template_of
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.fidelity.divergence import between
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES, NEEDS_IMPORTANCE_MATRIX
from kolotune.gguf import header, run_matrix
from kolotune.gguf.convert import convert_folder
from kolotune.gguf.quantize import quantize_file
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.llamacpp.model_server import ModelServer, ServerSettings
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import install
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.pipeline.status import StageState, StageStatus, read_status
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, RunFolder
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.serving.served_model import ServedModel

TINY = ("llama3_run", "torchtune_run", "qwen_run")
EVERY = (*TINY, "smollm2_run")
SMALL = ServerSettings(context=256)
BOS = {"llama3_run": 128000, "torchtune_run": 128000, "qwen_run": None, "smollm2_run": None}
STOPS = {
    "llama3_run": "<|eot_id|>",
    "torchtune_run": "<|eot_id|>",
    "qwen_run": "<|im_end|>",
    "smollm2_run": "<|im_end|>",
}
HARD = (
    "Hello WORLD, don't can't I'LL we've 1 12 123 1234567 3.14 €5\n\n\tif (x  >=  2) {\r\n    return\n}\n"
    " naïve Zürich 日本語テキスト Привет עברית हिन्दी 🎉👩‍👩‍👧  trailing   \n \n x_y__z http://a.b/c?d=e&f=%20"
    " Zu\u0308rich Tie\u0302\u0301ng \u1112\u1161\u11ab \u0645\u064f\u062d\u0645\u0651\u064e\u062f \u212b"
)  # llama.cpp composes no letters, and Qwen's tokenizer would
PRE = {"llama3_run": "llama-bpe", "torchtune_run": "llama-bpe", "qwen_run": "qwen2", "smollm2_run": "smollm"}


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def on(*names: str) -> Any:
    """Run the test on these runs; `name` is the fixture of each."""
    runs = [pytest.param(name, name, marks=[pytest.mark.slow] * (name == "torchtune_run"), id=name) for name in names]
    return pytest.mark.parametrize(("trained", "name"), runs, indirect=["trained"])


def encoded(run: RunFolder, part: str) -> list[tuple[list[int], list[bool]]]:
    """Return token ids and loss mask of each prepared chat."""
    tensors = load_file(run.prepared / f"{part}.safetensors")
    bounds = tensors["offsets"].tolist()
    return [
        (tensors["ids"][start:end].tolist(), tensors["labelled"][start:end].astype(bool).tolist())
        for start, end in pairwise(bounds)
    ]


def held_out(run: RunFolder) -> list[dict[str, Any]]:
    file = run.prepared / HELD_OUT_CHATS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def load(folder: Path) -> Any:
    """Load a model with transformers in fp32; no weight may be missing or unknown."""
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    """``[length, vocabulary]``"""
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def gguf_log_probabilities(path: Path, chats: list[list[int]]) -> list[np.ndarray]:
    model = ExactGguf(path, max(map(len, chats)))
    computed = [model.log_probabilities(ids, range(len(ids))) for ids in chats]
    model.close()
    return computed


@on(*EVERY)
def test_everything_is_there(trained: Any, name: str) -> None:
    run = trained.run
    assert trained.reporter.ran() == list(STAGES_WITHOUT_COMPARE)
    quantized = trained.config.quantization[0]
    results = {
        "adapter", "merged_model", "Merged.gguf", f"Merged{quantized}.gguf", "Modelfile", f"Modelfile{quantized}",
        "config.yaml", "metrics.jsonl", ".kolotune",
    }  # fmt: skip
    assert results <= {path.name for path in run.root.iterdir()}
    assert not [path for path in run.root.rglob("*.partial")]
    (_, before), (_, after) = held_out_losses(read_metrics(run.metrics))
    assert after < before


@on(*EVERY)
def test_everything_is_done(trained: Any, name: str) -> None:
    assert read_status(trained.run) == [StageStatus(stage, StageState.DONE) for stage in STAGES_WITHOUT_COMPARE]


@on(*EVERY)
def test_adapter_on_its_base_is_the_merged_model(trained: Any, name: str) -> None:
    from peft import PeftModel

    ids = encoded(trained.run, "held_out")[0][0]
    base = load(trained.base)
    before = logits_of(base, ids)
    adapted = logits_of(PeftModel.from_pretrained(base, trained.run.adapter).eval(), ids)
    merged = logits_of(load(trained.run.merged_model), ids)
    scale = np.abs(adapted).max()
    assert np.abs(adapted - before).max() > 0.02 * scale, "the training must have changed something"
    assert np.abs(adapted - merged).max() < 2e-3 * scale


@on(*EVERY)
def test_llama_cpp_computes_what_the_merged_model_computes(trained: Any, name: str) -> None:
    """The most likely token is the same at 99% of the answers' positions or more."""
    chats = encoded(trained.run, "held_out")
    merged = load(trained.run.merged_model)
    computed = gguf_log_probabilities(trained.run.gguf, [ids for ids, _ in chats])
    agreed = []
    for (ids, labelled), theirs in zip(chats, computed, strict=True):
        at = [position - 1 for position in range(1, len(ids)) if labelled[position]]
        agreed += (logits_of(merged, ids)[at].argmax(-1) == theirs[at].argmax(-1)).tolist()
    assert len(agreed) > 20
    assert np.mean(agreed) >= 0.99


def chats_with_prompts(run: RunFolder) -> Iterator[tuple[list[dict[str, Any]], list[int], int]]:
    """Yield each held-out chat with its ids, and the number of ids before the last answer."""
    chats, ids_of = held_out(run), encoded(run, "held_out")
    assert len(chats) == len(ids_of) > 0
    for chat, (ids, labelled) in zip(chats, ids_of, strict=True):
        assert chat["messages"][-1]["role"] == "assistant"
        start = len(labelled) - 1 - labelled[::-1].index(True)
        while labelled[start - 1]:
            start -= 1
        yield chat["messages"], ids, start


@on(*EVERY)
def test_llama_cpp_reads_the_prompt_as_it_was_trained(trained: Any, name: str) -> None:
    template = template_of(trained.run.tokenizer)
    with ModelServer(trained.run.gguf, SMALL) as model:
        for messages, ids, start in chats_with_prompts(trained.run):
            assert model.tokens(template.render(messages[:-1], None, True)) == ids[:start]
            assert model.tokens(template.render(messages, None, False)) == ids


@on(*EVERY)
def test_what_is_served_reads_the_prompt_as_it_was_trained(
    trained: Any, name: str, ollama_stand_in: OllamaStandIn
) -> None:
    """`serve` reads the same ids; Ollama the same number, where Go renders and the GGUF decides about the BOS."""
    server = OllamaClient(ollama_stand_in.host)
    install(trained.run, "m", trained.reporter, parameters=["num_predict=1", "temperature=0"], client=server)
    client = ollama.Client(ollama_stand_in.host, trust_env=False)
    with ServedModel(trained.run, None) as served:
        for messages, ids, start in chats_with_prompts(trained.run):
            request, _ = served.defaults.apply("/apply-template", {"messages": messages[:-1]})
            assert served.server.tokens(served.server.prompt(request), adds_special=True) == ids[:start]
            assert client.chat("m", messages[:-1]).prompt_eval_count == start


@on(*EVERY)
def test_llama_cpp_reads_any_text_as_the_tokenizer_does(trained: Any, name: str) -> None:
    tokenizer = load_tokenizer(trained.run.tokenizer)
    with ModelServer(trained.run.gguf, SMALL) as model:
        assert model.tokens(HARD) == tokenizer(HARD, add_special_tokens=False)["input_ids"]


@on(*EVERY)
def test_bos_exactly_once(trained: Any, name: str) -> None:
    """In training, in llama.cpp, and in Ollama, which has TEMPLATE and the flag in the GGUF."""
    fields = header.read(trained.run.gguf).fields
    template = parse_modelfile(trained.run.modelfile().read_text(encoding="utf-8")).template or ""
    if BOS[name] is None:
        assert fields["tokenizer.ggml.add_bos_token"] is False
        assert all(ids[0] != ids[1] for ids, _ in encoded(trained.run, "train"))
        assert not template.startswith("<|endoftext|>")
        return
    assert all(ids.count(BOS[name]) == 1 and ids[0] == BOS[name] for ids, _ in encoded(trained.run, "train"))
    assert fields["tokenizer.ggml.add_bos_token"] is True and "<|begin_of_text|>" not in template


@pytest.mark.slow
def test_bos_of_the_post_processor_does_not_count(llama3_run: Any, tmp_path: Path) -> None:
    """Llama 3's own tokenizer.json adds a BOS; a template that writes none must be served without one."""
    shutil.copytree(llama3_run.run.merged_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    assert config["add_bos_token"] is True
    file.write_text(json.dumps({**config, "add_bos_token": False}), encoding="utf-8")
    convert_folder(tmp_path / "model", tmp_path / "out.gguf", tmp_path / "log", llama3_run.reporter)
    assert header.read(tmp_path / "out.gguf").fields["tokenizer.ggml.add_bos_token"] is False


@on(*EVERY)
def test_the_gguf_carries_the_trained_template(trained: Any, name: str) -> None:
    template = (trained.run.tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    assert "strftime_now" not in template
    for path in (trained.run.gguf, trained.run.quantized(trained.config.quantization[0])):
        summary = header.read(path)
        assert summary.fields["tokenizer.chat_template"] == template
        assert summary.fields["tokenizer.ggml.pre"] == PRE[name]
    assert (trained.run.merged_model / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_the_date_is_frozen(llama3_run: Any) -> None:
    template = template_of(llama3_run.run.tokenizer)
    assert "Today Date: 05 Mar 2026" in template.render([{"role": "user", "content": "Hi"}], None, True)
    source = (llama3_run.base / "chat_template.jinja").read_text(encoding="utf-8")
    assert "strftime_now" in source, "otherwise there is nothing to freeze"
    text = parse_modelfile(llama3_run.run.modelfile().read_text(encoding="utf-8")).template
    assert text is None or "05 Mar 2026" in text


@on(*EVERY)
def test_the_ggufs_load_and_the_modelfiles_name_them(trained: Any, name: str) -> None:
    run, quantization = trained.run, trained.config.quantization[0]
    for modelfile, gguf in ((run.modelfile(), run.gguf), (run.modelfile(quantization), run.quantized(quantization))):
        parsed = parse_modelfile(modelfile.read_text(encoding="utf-8"))
        assert (run.root / parsed.from_).resolve() == gguf.resolve()
        assert ("stop", STOPS[name]) in parsed.parameters
        assert parsed.template and STOPS[name] in parsed.template
        with ModelServer(gguf, SMALL) as model:
            assert model.post("/completion", {"prompt": "Hello there", "temperature": 0.0, "n_predict": 5})["content"]


# --- what runs again


@on("llama3_run")
def test_nothing_changed_nothing_runs(trained: Any, name: str, tmp_path: Path) -> None:
    copy = trained.copy(tmp_path / "run")
    before = copy.records()
    reporter = copy.repeat()
    assert reporter.ran() == []
    assert sum("done before" in line for line in reporter.lines) == len(STAGES_WITHOUT_COMPARE)
    assert copy.records() == before


def test_smollm2_unchanged_runs_nothing(smollm2_run: Any) -> None:
    before = smollm2_run.records()
    assert smollm2_run.repeat().ran() == []
    assert smollm2_run.records() == before


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"quantization": ("Q8_0", "Q4_0")}, ["quantize", "modelfile"]),
        ({"system": "Be brief."}, ["modelfile"]),
        ({"learning_rate": 1e-3}, ["train", "merge", "convert", "quantize", "modelfile"]),
        ({"checkpoint_steps": 3}, []),
    ],
)
def test_what_changed_and_all_after_it_runs(
    changes: dict[str, Any], stages: list[str], qwen_run: Any, tmp_path: Path
) -> None:
    copy = qwen_run.copy(tmp_path / "run")
    before = copy.records()
    assert copy.repeat(**changes).ran() == stages
    after = copy.records()
    assert [name for name in STAGES_WITHOUT_COMPARE if before[name] != after[name]] == stages
    assert copy.repeat(**changes).ran() == []


def test_another_quantization_of_smollm2(smollm2_run: Any, tmp_path: Path) -> None:
    copy = smollm2_run.copy(tmp_path / "run")
    assert copy.repeat(quantization=("Q8_0",)).ran() == ["quantize", "modelfile"]
    summary = header.read(copy.run.quantized("Q8_0"))
    assert {tensor.type for tensor in summary.tensors.values()} == {"Q8_0", "F32"}
    parsed = parse_modelfile(copy.run.modelfile("Q8_0").read_text(encoding="utf-8"))
    assert parsed.from_ == "./MergedQ8_0.gguf"


# --- slow


@pytest.fixture(scope="session")
def wide_gguf(tmp_path_factory: pytest.TempPathFactory, smollm2_run: Any) -> Path:
    """A random model whose rows are whole blocks of every quantization, with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).half().save_pretrained(folder / "model")
    for path in smollm2_run.run.tokenizer.iterdir():
        shutil.copyfile(path, folder / "model" / path.name)
    convert_folder(folder / "model", folder / "Wide.gguf", folder / "log", smollm2_run.reporter)
    return folder / "Wide.gguf"


@pytest.fixture(scope="session")
def wide_matrix(smollm2_run: Any, wide_gguf: Path) -> Path:
    """An importance matrix of that model."""
    target = wide_gguf.with_name("matrix.gguf")
    run_matrix.make_matrix(wide_gguf, smollm2_run.run.prepared, target, target.with_name("log"), smollm2_run.reporter)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_quantization_does_what_the_table_says(
    kind: str, smollm2_run: Any, wide_gguf: Path, wide_matrix: Path, tmp_path: Path
) -> None:
    reporter = smollm2_run.reporter
    target = tmp_path / f"Wide{kind}.gguf"
    if kind in NEEDS_IMPORTANCE_MATRIX:
        with pytest.raises(ToolchainError, match="imatrix"):
            quantize_file(wide_gguf, target, kind, tmp_path / "log", reporter)
        assert not target.exists()
        quantize_file(wide_gguf, target, kind, tmp_path / "log", reporter, wide_matrix)
        ModelServer(target, SMALL).close()
        assert is_kept(target)
        return
    quantize_file(wide_gguf, target, kind, tmp_path / "log", reporter)
    assert target.stat().st_size <= wide_gguf.stat().st_size + 4096
    ModelServer(target, SMALL).close()
    # SmolLM2's rows of 576 are whole blocks of few types: llama.cpp takes a wider one where it knows one.
    target = tmp_path / f"SmolLM2{kind}.gguf"
    if kind == "Q1_0":
        with pytest.raises(ToolchainError, match="no replacement"):
            quantize_file(smollm2_run.run.gguf, target, kind, tmp_path / "log", reporter)
        return
    quantize_file(smollm2_run.run.gguf, target, kind, tmp_path / "log", reporter)
    ModelServer(target, SMALL).close()
    assert is_kept(target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q2_K", "IQ3_M"])
def test_fewer_bits_lose_less_by_the_training_chats(kind: str, smollm2_run: Any, tmp_path: Path) -> None:
    run, reporter, log = smollm2_run.run, smollm2_run.reporter, tmp_path / "log"
    run_matrix.make_matrix(run.gguf, run.prepared, tmp_path / "matrix", log, reporter)
    held_out = PreparedTokens.load(run.prepared / HELD_OUT_TOKENS)
    chats = [held_out.sequence(each)[0].tolist() for each in range(min(len(held_out), 8))]

    def likely(gguf: Path) -> np.ndarray:
        model = ExactGguf(gguf, max(map(len, chats)))
        found = np.concatenate([model.log_probabilities(each, range(len(each))) for each in chats])
        model.close()
        return found

    whole, apart = likely(run.gguf), {}
    for name, matrix in (("with", tmp_path / "matrix"), ("without", None)):
        quantize_file(run.gguf, tmp_path / name, kind, log, reporter, matrix)
        apart[name] = between(whole, likely(tmp_path / name))
    print({name: (each.kl_mean, each.top1_agreement) for name, each in apart.items()})
    assert apart["with"].kl_mean < apart["without"].kl_mean


@pytest.mark.slow
def test_torchtune_has_the_defaults_of_the_original_scripts(torchtune_run: Any) -> None:
    """In the options that the run does not set."""
    config = torchtune_run.config
    assert (config.batch_size, config.gradient_accumulation, config.lora_alpha) == (1, 1, 16.0)
    assert "k_proj" not in config.target_modules
    adapter = json.loads((torchtune_run.run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 16)
    assert sorted(adapter["target_modules"]) == sorted(config.target_modules)
    assert adapter["base_model_name_or_path"] == str(torchtune_run.base)


@pytest.mark.slow
def test_torchtunes_held_out_loss_is_the_one_that_peft_finds(torchtune_run: Any) -> None:
    run = torchtune_run.run
    _, (_, after) = held_out_losses(read_metrics(run.metrics))
    assert after == pytest.approx(held_out_loss(torchtune_run.base, run.adapter, run.prepared), rel=1e-4)
