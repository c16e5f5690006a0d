"""What ``/api/show`` is compared with: the rule says which template and which capabilities it must name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.observed import OBSERVED, ObservedModel

from kolotune.foundation.typed_storage import JsonObject
from kolotune.ollama.confirmation import Difference, SentModel, find_differences
from kolotune.ollama.modelfile import ModelDescription

SHA256 = "a" * 64
METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 8192,
    "tokenizer.chat_template": "",
    "general.quantization_version": 2,
    "general.file_type": 1,
}
SHOWN: JsonObject = {"modelfile": f"FROM C:\\Users\\me\\blobs\\sha256-{SHA256}\r\nTEMPLATE x\n"}
PLAIN = "{{ range .Messages }}{{ .Content }}{{ end }}"


def sent(jinja: str = "", template: str | None = None, **fields: object) -> SentModel:
    metadata = {**METADATA, "tokenizer.chat_template": jinja, **fields}
    return SentModel(ModelDescription("./x", template), SHA256, metadata, (0, 33, 0))


@pytest.mark.parametrize("model", OBSERVED, ids=lambda model: model.name)
def test_observed_models_are_confirmed(model: ObservedModel) -> None:
    stops = [f'stop                           "{stop}"' for stop in model.stops]
    shown = SHOWN | {
        "template": model.shown_template,
        "capabilities": list(model.capabilities),
        "parameters": "\n".join(stops),
    }
    assert find_differences(shown, sent(model.jinja, model.template)) == []


def test_another_template_in_use() -> None:
    jinja = "{{ messages }} tools"
    model = sent(jinja, PLAIN)
    assert find_differences(SHOWN | {"template": jinja}, model) == []
    difference = Difference("template", "of the Modelfile", "of the GGUF")
    assert find_differences(SHOWN | {"template": PLAIN}, model) == [difference]
    assert find_differences(SHOWN | {"template": "x"}, model) == [Difference("template")]
    # A server that reads no Jinja.
    assert find_differences(SHOWN | {"template": PLAIN}, replace(model, version=(0, 24, 0))) == []


def test_other_capabilities() -> None:
    shown = SHOWN | {"template": PLAIN, "capabilities": ["completion", "tools"]}
    assert find_differences(shown, sent("", PLAIN)) == [
        Difference("capabilities", "completion, tools", "completion"),
    ]
    gemma = sent("", PLAIN, **{"general.architecture": "gemma4"})
    assert find_differences(shown | {"capabilities": ["vision"]}, gemma) == []


def test_a_template_that_is_not_understood() -> None:
    odd = '{{ template "x" . }}'
    model = sent("jinja", odd)
    assert model.rule({"template": odd}) is None
    for template, differs in ((odd, False), ("jinja", False), ("other", True)):
        assert bool(find_differences(SHOWN | {"template": template}, model)) == differs


def test_weights_that_the_server_rewrites_have_another_hash() -> None:
    shown = {"modelfile": f"FROM /blobs/sha256-{'b' * 64}\n"}
    assert find_differences(shown, sent()) == [Difference("weights", "b" * 12, "a" * 12)]
    older = dict(reversed(METADATA.items()))
    assert find_differences(shown, replace(sent(), metadata=older)) == []
    assert find_differences({}, replace(sent(), metadata=older)) == [Difference("weights", "unnamed", "a" * 12)]
    assert replace(sent(), metadata=older, version=(0, 29, 0)).is_stored_as_sent


@pytest.mark.parametrize(
    ("parameters", "context", "longest"),
    [
        ((), 8192, 4096),
        ((("num_ctx", 512),), 8192, 512),
        ((("num_ctx", 65536),), 1024, 1024),
        ((("num_ctx", 0),), 0, 4096),
    ],
)
def test_the_longest_prompt(parameters: tuple[tuple[str, int], ...], context: int, longest: int) -> None:
    model = sent(**{"llama.context_length": context})
    assert replace(model, description=replace(model.description, parameters=parameters)).longest_prompt == longest
