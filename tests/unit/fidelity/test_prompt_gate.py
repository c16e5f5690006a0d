"""Before training: the prompts that llama.cpp's server will write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.small_tokenizer import THINKING

from kolotune.chats.traits import ChatTrait
from kolotune.fidelity import prompt_gate
from kolotune.fidelity.prompt_gate import check_prompts, find_proof
from kolotune.fidelity.prompt_proof import Outcome, PromptResult
from kolotune.foundation import config as configs
from kolotune.foundation.errors import TemplateError, ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import HELD_OUT_TOKENS, RunFolder
from kolotune.run_folder.stage import Context
from kolotune.stages import prepare

# The descriptions of tools as Python writes them, which llama.cpp writes without escapes.
TOOLS_AS_PYTHON = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}"
    "{{ tool.function.name }} {{ [tool.function.description] | string }}\n"
    "{% endfor %}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALL_AS_PYTHON = TOOLS_AS_PYTHON.replace("{{ bos_token }}", "{{ {'a': 'b\\nc'} | string }}")
"""The same difference in every prompt."""
Make = Callable[..., Context]


class Warnings(PlainReporter):
    """Keeps what it warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Make:
    """A run of the tiny model with another template, or with other files: ``make(template, **options)``."""

    def context(template: str = "", files: dict[str, str] | None = None, **options: object) -> Context:
        base = tmp_path / "base"
        shutil.copytree(tiny_base, base)
        if template:
            (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        for name, content in (files or {}).items():
            (base / name).write_text(content, encoding="utf-8")
        values = {"base_model": str(base), "output_dir": tmp_path / "run", "train_data": tmp_path / "c.jsonl"}
        config = configs.resolve(({**values, **options}, "test", tmp_path))
        return Context(config, RunFolder(tmp_path / "run"), base)

    return context


def by_trait(context: Context) -> dict[str, PromptResult]:
    proof = find_proof(context, PlainReporter(), is_prepared=False)
    return {result.name: result for result in proof.results}


def test_prompts_are_equal_and_asked_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make()
    results = by_trait(context)
    assert set(results) == set(ChatTrait)
    assert results[ChatTrait.QUESTION].outcome == results[ChatTrait.SPACES].outcome == Outcome.EQUAL
    assert results[ChatTrait.TOOLS].outcome == Outcome.TRAINING_REFUSES
    monkeypatch.setattr(prompt_gate, "PromptServer", None)
    assert by_trait(context) == results, "from the cache"
    reporter = Warnings()
    check_prompts(context, reporter, set(ChatTrait), is_prepared=False)
    assert not reporter.warnings


def test_both_sides_of_a_switch_are_asked_for(make: Make) -> None:
    context = make(THINKING, template_switch="enable_thinking")
    results = find_proof(context, PlainReporter(), is_prepared=False).results
    for trait in (ChatTrait.QUESTION, ChatTrait.SYSTEM, ChatTrait.TURNS, ChatTrait.THOUGHTS):
        assert [result.outcome for result in results if result.name == trait] == [Outcome.EQUAL] * 2


def test_a_difference_that_the_chats_have_ends_the_run(make: Make) -> None:
    context, reporter = make(TOOLS_AS_PYTHON), Warnings()
    with pytest.raises(TemplateError) as caught:
        check_prompts(context, reporter, {ChatTrait.TOOLS, ChatTrait.RICH_TOOLS}, is_prepared=False)
    assert ChatTrait.RICH_TOOLS.sentence in caught.value.cause
    assert r"Tag:\\n- heute" in caught.value.cause and r"Tag:\n- heute" in caught.value.cause, "both are shown"
    assert "template" in caught.value.hint and "--no-compare" in caught.value.hint


def test_a_difference_that_they_do_not_have_is_a_warning(make: Make) -> None:
    context, reporter = make(TOOLS_AS_PYTHON), Warnings()
    check_prompts(context, reporter, {ChatTrait.QUESTION, ChatTrait.TOOLS}, is_prepared=False)
    (warning,) = reporter.warnings
    assert ChatTrait.RICH_TOOLS.sentence in warning


def test_without_compare_it_is_a_warning(make: Make) -> None:
    context, reporter = make(TOOLS_AS_PYTHON, compare=False), Warnings()
    check_prompts(context, reporter, {ChatTrait.RICH_TOOLS}, is_prepared=False)
    assert len(reporter.warnings) == 1


def test_before_the_chats_are_known_only_what_is_always_wrong_counts(make: Make) -> None:
    reporter = Warnings()
    check_prompts(make(TOOLS_AS_PYTHON), reporter, None, is_prepared=False)
    assert not reporter.warnings


@pytest.mark.slow
def test_what_is_always_wrong_ends_the_run_before_the_chats_are_read(make: Make) -> None:
    with pytest.raises(TemplateError, match=ChatTrait.QUESTION.sentence):
        check_prompts(make(ALL_AS_PYTHON), Warnings(), None, is_prepared=False)


def composing(base: Path, form: str = "NFC") -> dict[str, str]:
    """Return the tokenizer of a base with a normaliser like those of Qwen 2 and Command-R; llama.cpp has none."""
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    return {"tokenizer.json": json.dumps({**tokenizer, "normalizer": {"type": form}})}


def splitting(base: Path) -> dict[str, str]:
    """Return the tokenizer of a base that splits one word in its own way, of which the converter can't know."""
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    word = {"type": "Split", "pattern": {"String": "zyx"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [word, tokenizer["pre_tokenizer"]]}
    return {"tokenizer.json": json.dumps({**tokenizer, "pre_tokenizer": both})}


@pytest.mark.slow
def test_letters_that_a_tokenizer_would_compose_are_trained_as_they_are_served(make: Make, tiny_base: Path) -> None:
    context, reporter = make(files=composing(tiny_base)), Warnings()
    results = by_trait(context)
    assert results[ChatTrait.COMBINING_MARKS].outcome == results[ChatTrait.QUESTION].outcome == Outcome.EQUAL
    check_prompts(context, reporter, {ChatTrait.COMBINING_MARKS}, is_prepared=False)
    assert not reporter.warnings


@pytest.mark.slow
def test_a_tokenizer_that_replaces_characters_is_refused(make: Make, tiny_base: Path) -> None:
    """llama.cpp has no words of that tokenizer, so the converter knows it before anything is asked."""
    with pytest.raises(ToolchainError, match="pre-tokenizer was not recognized"):
        by_trait(make(files=composing(tiny_base, "NFKC")))


def prepared(context: Context, words: Sequence[str], folder: Path) -> Context:
    """Prepare a chat for each word."""
    turns = [[("user", f"{word} {number}"), ("assistant", "ok")] for number, word in enumerate(words)]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in each]}) for each in turns]
    (folder / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare.run(context, PlainReporter())
    return context


@pytest.mark.parametrize("strange", [0, 1, 2])
def test_all_training_chats_are_asked_for(strange: int, make: Make, tiny_base: Path, tmp_path: Path) -> None:
    words = ["azyxb"] * strange + ["good"] * (150 - strange)
    context = prepared(make(files=splitting(tiny_base), eval_split=0.0), words, tmp_path)
    reporter, counted = Warnings(), rf"{strange} of 150 training chats have other tokens in llama\.cpp"
    if strange > 1:  # of a hundred
        with pytest.raises(TemplateError, match=counted) as caught:
            check_prompts(context, reporter, [], is_prepared=True)
        assert "a zy x b" in caught.value.cause and "--no-compare" in caught.value.hint
        return
    check_prompts(context, reporter, [], is_prepared=True)
    assert [bool(re.match(counted, warning)) for warning in reporter.warnings] == [True] * strange


def test_no_held_out_chat_may_differ(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    context = make(files=splitting(tiny_base), eval_split=0.2)
    tokens = prepared(context, ["azyxb"] * 10, tmp_path).run.prepared / HELD_OUT_TOKENS
    strange = tokens.read_bytes()
    prepared(context, ["good"] * 10, tmp_path)
    tokens.write_bytes(strange)
    with pytest.raises(TemplateError, match=r"2 of 2 held-out chats"):
        check_prompts(context, Warnings(), [], is_prepared=True)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Zu\u0308rich", "Zürich", "Zu\u0308rich <|im_end|>"])
def test_chats_with_letters_apart_from_their_accents(text: str, make: Make, tiny_base: Path, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"{text} {n}"}, {"role": "assistant", "content": f"{n}."}] for n in range(20)]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    (tmp_path / "c.jsonl").write_text("".join(lines), encoding="utf-8")
    context = make(files=composing(tiny_base), eval_split=0.3)
    facts = prepare.run(context, PlainReporter())
    assert (ChatTrait.COMBINING_MARKS in str(facts["traits"])) is ("\u0308" in text)
    assert facts["as_written"] == (20 if "\u0308" in text else 0)
    # What has special tokens in its text can't be served as it was trained; `prepare` has reported it.
    check_prompts(context, Warnings(), [], is_prepared=True)


@pytest.mark.slow
def test_a_template_that_llama_cpp_cannot_use(make: Make) -> None:
    template = TOOLS_AS_PYTHON.replace("{{ bos_token }}", "{{ 'a' | center(9) }}")
    with pytest.raises(TemplateError, match="llama"):
        check_prompts(make(template), Warnings(), None, is_prepared=False)


@pytest.mark.slow
def test_without_a_conversion_plan(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter itself writes the vocabulary."""
    context = make()
    planned = by_trait(context)
    monkeypatch.setenv("KOLOTUNE_CONVERSION_PLAN", "off")
    assert by_trait(context) == planned
