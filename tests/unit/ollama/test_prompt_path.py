"""Ollama's rule: what renders a model's prompts, what show names, what the model can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.observed import OBSERVED, ObservedModel

from kolotune.foundation.errors import ArtifactError
from kolotune.ollama.prompt_path import (
    NO_TEMPLATE,
    READS_JINJA,
    PromptPath,
    PromptRule,
    TemplateSources,
    find_rule,
    own_rendering,
)
from kolotune.ollama.template_capabilities import Capability, TemplateCapabilities, jinja_capabilities

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
TOOLS = "{{ range .Tools }}{{ . }}{{ end }}" + PLAIN
ROUND_TRIP = TOOLS + '{{ range .Messages }}{{ .ToolCalls }}{{ if eq .Role "tool" }}{{ end }}{{ end }}'


@pytest.mark.parametrize("model", OBSERVED, ids=lambda model: model.name)
def test_every_observed_model(model: ObservedModel) -> None:
    rule = find_rule(model.sources, (0, 33, 0))
    assert rule.template == model.shown_template
    assert rule.capabilities == set(model.capabilities)
    paths = {"gguf": PromptPath.JINJA, "modelfile": PromptPath.TEMPLATE, "known": PromptPath.KNOWN_TEMPLATE}
    assert rule.path is paths[model.shows]


@pytest.mark.parametrize(
    ("template", "version", "path"),
    [
        # As many capabilities: the round trip decides, since 0.30.11.
        (TOOLS, (0, 33, 0), PromptPath.JINJA),
        (TOOLS, (0, 30, 11), PromptPath.JINJA),
        (TOOLS, (0, 30, 10), PromptPath.TEMPLATE),
        (ROUND_TRIP, (0, 33, 0), PromptPath.TEMPLATE),
        (PLAIN, (0, 30, 0), PromptPath.JINJA),
        (PLAIN, (0, 24, 0), PromptPath.TEMPLATE),
        (PLAIN, (), PromptPath.JINJA),
        ("", (), PromptPath.JINJA),
        (None, (0, 24, 0), PromptPath.NONE),
    ],
)
def test_versions(template: str | None, version: tuple[int, ...], path: PromptPath) -> None:
    jinja = CHATML + "{# tools, tool_calls, tool_response #}"
    rule = find_rule(TemplateSources("llama", jinja, template), version)
    assert rule.path is path
    assert rule.template == (jinja if path is PromptPath.JINJA else template or NO_TEMPLATE)
    assert rule.tools == (path is PromptPath.JINJA or template in (TOOLS, ROUND_TRIP))


def test_more_capabilities_do_not_win_against_a_round_trip() -> None:
    jinja = CHATML + "{# tools <think> </think> #}"
    assert find_rule(TemplateSources("llama", jinja, ROUND_TRIP)).path is PromptPath.TEMPLATE
    assert find_rule(TemplateSources("llama", jinja + "{# tool_calls ipython #}", ROUND_TRIP)).path is PromptPath.JINJA


@pytest.mark.parametrize("architecture", ["gemma4", "laguna", "nemotron_h", "nemotron_h_moe"])
def test_ollamas_own_rendering_comes_first(architecture: str) -> None:
    own = own_rendering(architecture)
    assert own is not None and own_rendering(architecture, (0, 19, 9)) is None
    rule = find_rule(TemplateSources(architecture, CHATML, PLAIN))
    everything = frozenset([Capability.COMPLETION, Capability.TOOLS, Capability.THINKING])
    assert rule == PromptRule(PromptPath.RENDERER, PLAIN, everything)
    assert find_rule(TemplateSources(architecture, CHATML, PLAIN), (0, 19, 0)).path is PromptPath.TEMPLATE
    assert find_rule(TemplateSources("llama", CHATML, parser="qwen3")).path is PromptPath.RENDERER


def test_gpt_oss_takes_template_only_if_it_looks_like_harmony() -> None:
    jinja = CHATML + "tools"
    template = "{{ range .Messages }}<|start|>{{ .Content }}<|end|>{{ end }}"
    harmony = find_rule(TemplateSources("gpt-oss", jinja, template))
    assert harmony.path is PromptPath.HARMONY and harmony.path.is_go and not harmony.tools
    without = find_rule(TemplateSources("gpt-oss", jinja))
    assert without.path is PromptPath.JINJA and without.tools and Capability.THINKING in without.capabilities
    assert find_rule(TemplateSources("llama", jinja, template)).path is PromptPath.JINJA


def test_a_template_in_more_of_the_language_than_is_known() -> None:
    with pytest.raises(ArtifactError):
        find_rule(TemplateSources("llama", CHATML, '{{ template "x" . }}'))


def test_a_modelfile_without_anything() -> None:
    sources = TemplateSources("llama", "", None)
    assert find_rule(sources) == PromptRule(PromptPath.NONE, NO_TEMPLATE, frozenset([Capability.COMPLETION]))
    assert find_rule(dataclasses.replace(sources, known=PLAIN)).path is PromptPath.KNOWN_TEMPLATE
    assert find_rule(dataclasses.replace(sources, jinja=CHATML), READS_JINJA).path is PromptPath.JINJA


# The templates that come with llama.cpp, by what the functions of Ollama's own source say of their words: tools and
# thinking; whether tool calls and results are written, too. A TEMPLATE without tools serves only the last group.
PUBLISHED: dict[tuple[bool, bool, bool], str] = {
    (True, True, True): """
        Bielik-11B-v3.0-Instruct GLM-4.6 GLM-4.7-Flash Kimi-K2-Thinking MiniMax-M2
        NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 NVIDIA-Nemotron-Nano-v2 Qwen-QwQ-32B Qwen-Qwen3-0.6B Qwen3.5-4B
        Reka-Edge Spark2.5 StepFun3.5-Flash deepseek-ai-DeepSeek-R1-Distill-Llama-8B
        deepseek-ai-DeepSeek-R1-Distill-Qwen-32B deepseek-ai-DeepSeek-V3.1 deepseek-ai-DeepSeek-V3.2
        deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731 inclusionai-ling-3.0-flash llama-cpp-deepseek-r1
        openbmb-MiniCPM5-1B poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2
    """,
    (True, True, False): """
        LFM2.5-8B-A1B LFM2.5-Instruct ibm-granite-granite-3.3-2B-Instruct
    """,
    (True, False, True): """
        Apertus-8B-Instruct Apriel-1.6-15b-Thinker-fixed CohereForAI-c4ai-command-r-plus-tool_use
        GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B Kimi-K2-Instruct Kimi-K3 MiMo-VL MiniMax-M1 MiniMax-M3
        Mistral-Small-3.2-24B-Instruct-2506 NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use
        NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-Qwen2.5-7B-Instruct Qwen3-Coder google-gemma-4-31B-it
        google-gemma-4-31B-it-interleaved ibm-granite-granite-4.0 ibm-granite-granite-4.1
        meetkai-functionary-medium-v3.1 meetkai-functionary-medium-v3.2 meta-llama-Llama-3.1-8B-Instruct
        meta-llama-Llama-3.2-3B-Instruct meta-llama-Llama-3.3-70B-Instruct mistralai-Ministral-3-14B-Reasoning-2512
        mistralai-Mistral-Nemo-Instruct-2407 moonshotai-Kimi-K2 openai-gpt-oss-120b tencent-Hy3 unsloth-Apriel-1.5
        unsloth-mistral-Devstral-Small-2507 upstage-Solar-Open-100B
    """,
    (True, False, False): """
        ByteDance-Seed-OSS Cohere2MoE CohereForAI-c4ai-command-r7b-12-2024-tool_use LFM2-8B-A1B
        fireworks-ai-llama-3-firefunction-v2 muse-glimmer
    """,
    (False, True, False): """
        HuggingFaceTB-SmolLM3-3B llama-cpp-rwkv-world
    """,
    (False, False, False): """
        google-gemma-2-2b-it microsoft-Phi-3.5-mini-instruct
    """,
}


def test_published_templates(templates_folder: Path) -> None:
    expected = {name: words for words, names in PUBLISHED.items() for name in names.split()}
    assert len(expected) > 60 and expected.keys() == {path.stem for path in templates_folder.glob("*.jinja")}
    for name, (tools, thinking, round_trip) in expected.items():
        jinja = (templates_folder / f"{name}.jinja").read_text(encoding="utf-8")
        named = tuple(kind for kind, has in ((Capability.TOOLS, tools), (Capability.THINKING, thinking)) if has)
        assert jinja_capabilities(jinja) == TemplateCapabilities(named, round_trip), name
        path = find_rule(TemplateSources("llama", jinja, PLAIN)).path
        assert path is (PromptPath.JINJA if named else PromptPath.TEMPLATE), name
