"""Published chat templates: what llama.cpp's server writes is what is trained, or is refused before training.

Each template has a small tokenizer with its special tokens, and is bound to a date in the past: the server hands
today's, and its own defaults, to every template.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from support.masking import DATE, FAMILIES, byte_level
from support.tokenizer_gguf import gguf_of

from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.chats.tokens.tokenizer import writes_bos
from kolotune.chats.traits import ChatTrait
from kolotune.fidelity.prompt_proof import MismatchKind, Outcome, PromptResult, ask
from kolotune.fidelity.trained_format import TrainedFormat
from kolotune.fidelity.vocabulary import vocabulary_by_id
from kolotune.foundation.errors import TemplateError
from kolotune.llamacpp.prompt_server import PromptServer
from kolotune.llamacpp.tokenizer_model import tokenizer_model

# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)
_SPECIAL = re.compile(
    r"<[|｜][^<>]{1,40}[|｜]>|<\|?[a-z_:]+\|?>(?=['\"\n])|<(?:turn\||\|turn)>|\[/?[A-Z_]{3,30}\]|\]~!?b\[|\[e~\["
)
_BOS = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>", "<|startoftext|>")
# Where llama.cpp's own rendering differs: it strips texts, writes results of tools in another form, opens a turn more,
# and writes Python's lists and null in its own way.
KNOWN = {
    ("StepFun3.5-Flash", ChatTrait.SPACES),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.CALL),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.PARALLEL_CALLS),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.CALL_AND_TEXT),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.CALL_WITHOUT_ARGUMENTS),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.RICH_CALL),
    ("google-gemma-4-31B-it-interleaved", ChatTrait.TURNS_AFTER_CALL),
    ("google-gemma-4-31B-it", ChatTrait.CALL_AND_TEXT),
    ("openbmb-MiniCPM5-1B", ChatTrait.RICH_CALL),
}


def prove(file: Path, folder: Path, switches: tuple[str, ...] = ()) -> list[PromptResult]:
    """Ask for the prompts of a template; a `TemplateError` where it can't be trained with."""
    source = file.read_text(encoding="utf-8")
    known = next((family for family in FAMILIES.values() if family.file == file.stem), None)
    special = {*(known.special if known else _SPECIAL.findall(source))} - {"<think>", "</think>"}
    bos = known.bos if known else next((token for token in _BOS if token in special), "")
    if "eos_token" in source:
        special.add("</s>")
    tokenizer = copy.deepcopy(byte_level(tuple(sorted(special))))
    tokenizer.bos_token = bos or None
    tokenizer.eos_token = "</s>" if "eos_token" in source else None
    tokenizer.save_pretrained(folder)
    tokens = {"bos_token": bos} if bos else {}
    tokens |= {"eos_token": "</s>"} if "eos_token" in source else {}
    jinja = bind(source, DATE, tokens, switches)
    adds_bos = writes_bos(ChatTemplate(jinja, tokens), jinja)
    trained = TrainedFormat.load(folder, jinja)
    model = tokenizer_model(gguf_of(tokenizer, folder / "small.gguf", jinja, adds_bos=adds_bos))
    with PromptServer(model) as server:
        return list(ask(trained.battery(), server, vocabulary_by_id(trained.tokenizer), bos))


def check(file: Path, folder: Path) -> set[ChatTrait]:
    """Check that prompts are equal but for those that are `KNOWN`; return the traits that can be trained."""
    trained = set()
    for result in prove(file, folder):
        trait = ChatTrait(result.name)
        if result.outcome in (Outcome.TRAINING_REFUSES, Outcome.BOTH_REFUSE):
            continue
        trained.add(trait)
        is_equal = result.outcome is Outcome.EQUAL
        assert is_equal is ((file.stem, trait) not in KNOWN), (file.stem, result)
        assert is_equal or (result.mismatch is not None and result.mismatch.kind is MismatchKind.TEMPLATE)
    return trained


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct", {"parallel-calls", "call-and-text", "thoughts", "thoughts-before-call"}),
        ("Qwen-Qwen2.5-7B-Instruct", {"thoughts", "thoughts-before-call"}),
        ("google-gemma-4-31B-it", {"thoughts", "thoughts-before-call"}),
    ],
)
def test_well_known_templates(name: str, refused: set[str], templates_folder: Path, tmp_path: Path) -> None:
    trained = check(templates_folder / f"{name}.jinja", tmp_path)
    assert {trait.value for trait in ChatTrait if trait not in trained} <= refused


def test_both_sides_of_a_switch(templates_folder: Path, tmp_path: Path) -> None:
    """The server is asked with the switch on for answers with thoughts, and off for others."""
    results = prove(templates_folder / "Qwen-Qwen3-0.6B.jinja", tmp_path, ("enable_thinking",))
    assert len(results) == 2 * len(ChatTrait)
    assert {result.outcome for result in results} == {Outcome.EQUAL}


@pytest.mark.slow
def test_all_public_templates(templates_folder: Path, tmp_path: Path) -> None:
    trainable = 0
    for file in sorted(templates_folder.glob("*.jinja")):
        folder = tmp_path / file.stem
        folder.mkdir()
        try:
            trainable += bool(check(file, folder))
        except TemplateError:
            continue
    assert trainable > 50
