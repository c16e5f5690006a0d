"""Installing a run's model in Ollama: what arrives, what is refused, and what happens when something fails.

With OLLAMA_HOST set, the tests that need no faults run against that server, with random model names.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ollama_stand_in import OllamaStandIn, only_real
from support.tiny import chat_line

from kolotune.chats.tokens.tokenizer import template_text
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, OllamaError, RunFolderError
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama import install as installing
from kolotune.ollama.chat import OllamaChat
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import install, installed_name, uninstall
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.terminal_chat import open_chat

# The sampling of `chat`, so that the same seed gives the same answer in both.
PLAIN = ("repeat_penalty=1", "min_p=0.05", "top_p=0.95")
QUESTIONS = ("What is 2 plus 1?", 'He said "{{ .System }}" 🙂 <|im_end|>\n\n.')
REAL = bool(os.environ.get("OLLAMA_HOST"))


@pytest.fixture
def name(any_ollama: str) -> Iterator[str]:
    name = f"kolotune-test-{os.urandom(4).hex()}"
    yield name
    OllamaClient(any_ollama).delete(name)


def answer_of(chat: Any, question: str, **more: Any) -> str:
    return "".join(chat.ask(question, temperature=1.5, max_tokens=24, seed=7, **more))


def edit(run: RunFolder, more: str, quantization: str = "Q4_K_M") -> None:
    with run.modelfile(quantization).open("a", encoding="utf-8", newline="") as file:
        file.write(more)


def test_ollama_answers_as_the_run_does(
    any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    import ollama

    # From the f16 file: what of a prompt is cached changes the answers of quantized ones.
    install(run_copy, name, reporter, parameters=PLAIN, quantization="none", client=OllamaClient(any_ollama))
    chat = OllamaChat(name, client=OllamaClient(any_ollama))
    turns = [{"role": "user", "content": QUESTIONS[1]}]
    with open_chat(run_copy, reporter, quantization="none") as here:
        for question in QUESTIONS:  # the second one with the first in its history
            answer = answer_of(chat, question)
            assert len(set(answer)) > 10
            assert answer == answer_of(here, question) or REAL  # a real server has a different random generator
        prompt = here.server.tokens(here.server.prompt({"messages": turns}), adds_special=True)
    # The prompt has the same length: the template is the trained one, and there is one BOS or none.
    response = ollama.Client(any_ollama, trust_env=False).chat(name, turns, options={"num_predict": 1})
    assert response.prompt_eval_count == len(prompt)
    assert installed_name(run_copy) == name


def test_the_same_model_is_not_sent_twice_and_a_different_one_not_replaced(
    any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    server = OllamaClient(any_ollama)
    install(run_copy, name, reporter, client=server)
    first = server.digest(name)
    assert first and first[:12] in capsys.readouterr().out
    install(run_copy, name.upper(), reporter, client=server)
    assert "unchanged" in capsys.readouterr().out
    with pytest.raises(ConfigError) as error:
        install(run_copy, name, reporter, quantization="none", client=server)
    assert error.value.exit_code == 2 and "--force" in error.value.hint
    assert server.digest(name) == first
    install(run_copy, name, reporter, quantization="f16", force=True, client=server)
    assert server.digest(name) != first and "Merged.gguf" in capsys.readouterr().out


def test_edits_of_the_modelfile_apply(any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter) -> None:
    edit(run_copy, 'SYSTEM """You are\n"terse"."""\nPARAMETER stop "xyz"\nPARAMETER num_ctx 512\n')
    edit(run_copy, "LICENSE mine\nMESSAGE user Hello: you\nMESSAGE assistant Hi.\n")
    server = OllamaClient(any_ollama)
    install(run_copy, name, reporter, client=server)
    shown = server.show(name)
    assert shown is not None
    assert shown["system"] == 'You are\n"terse".' and shown["license"] == "mine"
    assert [(turn["role"], turn["content"]) for turn in shown["messages"]] == [
        ("user", "Hello: you"),
        ("assistant", "Hi."),
    ]
    lines = {" ".join(line.split()) for line in shown["parameters"].splitlines()}
    assert {'stop "xyz"', 'stop "<|im_end|>"', "num_ctx 512"} <= lines


def test_texts_that_no_modelfile_can_carry(
    any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    hard = 'x"""\nADAPTER /etc/shadow\u200d\x1b\u00a0end\n'
    server = OllamaClient(any_ollama)
    parameters = ("stop=a\u200db", "temperature=0.25")
    install(run_copy, name, reporter, system=hard, parameters=parameters, client=server)
    shown = server.show(name)
    assert shown is not None and shown["system"] == hard
    lines = [line.split(None, 1) for line in shown["parameters"].splitlines()]
    assert ["temperature", "0.25"] in lines
    assert [value for key, value in lines if key == "stop"] == ['"a\\u200db"']


def test_uninstall(any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter) -> None:
    server = OllamaClient(any_ollama)
    install(run_copy, name, reporter, client=server)
    uninstall(name, reporter, server)
    assert server.show(name) is None
    with pytest.raises(ConfigError, match="no model"):
        uninstall(name, reporter, server)
    with pytest.raises(OllamaError, match="not found"):
        answer_of(OllamaChat(name, client=server), "Hello?")


@only_real
def test_a_template_that_ollama_chooses(
    any_ollama: str, name: str, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    """Without TEMPLATE, Ollama takes one that it knows for SmolLM2's, which lacks the default system text."""
    lines = run_copy.modelfile("Q4_K_M").read_text(encoding="utf-8").split("\n")
    run_copy.modelfile("Q4_K_M").write_text("\n".join([lines[0], *(x for x in lines if x.startswith("PARAMETER"))]))
    with pytest.raises(OllamaError, match="prompts are not as trained"):
        install(run_copy, name, reporter, client=OllamaClient(any_ollama))


# ---------------------------------------------------------------- faults, which only the fake server has


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("down in blob", "connection"),
        ("damage in blob", "digest mismatch"),
        ("error in create", "this GGUF is of no use"),
        ("create refused", "no place for that (400)"),
        ("create breaks off", "stopped before"),
        ("create cut", "connection"),
        ("silent create", "does not respond"),
        ("another template", "the template differs"),
        ("another prompt", "prompts are not as trained; for a chat of user Ollama has"),
        ("another count", "tokens where training has"),
        ("another stop", "stop "),
        ("other weights", "weights 000000000000"),
        ("forgets", "there is no such model"),
    ],
)
def test_faults(
    fault: str, words: str, ollama_stand_in: OllamaStandIn, finished: Config, reporter: PlainReporter, tmp_path: Path
) -> None:
    run, server = RunFolder(finished.output_dir), OllamaClient(ollama_stand_in.host)
    ollama_stand_in.fault = fault
    impatient = OllamaClient(ollama_stand_in.host, patience=2) if fault == "silent create" else server
    with pytest.raises(OllamaError) as error:
        install(run, "m", reporter, client=impatient, force=True)
    assert words in error.value.cause and error.value.exit_code == 24 and error.value.hint
    assert not run.installed.exists()
    ollama_stand_in.fault = ""
    install(run, "m", reporter, client=server, force=True)
    run.installed.unlink()


def test_weights_are_sent_once(ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter) -> None:
    server = OllamaClient(ollama_stand_in.host)
    install(run_copy, "one", reporter, client=server)
    install(run_copy, "two", reporter, client=server)
    assert (
        ollama_stand_in.count_requests("POST", "/api/blobs/") == 1
        and ollama_stand_in.count_requests("HEAD", "/api/blobs/") == 2
    )
    install(run_copy, "two", reporter, client=server)
    assert ollama_stand_in.count_requests("POST", "/api/create") == 2


def test_bad_requests_are_refused_before_anything_is_sent(
    ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    server = OllamaClient(ollama_stand_in.host)
    with pytest.raises(ConfigError, match="can't be the name"):
        install(run_copy, "../up", reporter, client=server)
    with pytest.raises(ConfigError, match="can't be the name"):
        uninstall("a b", reporter, server)
    with pytest.raises(ConfigError, match="temprature is unknown"):
        install(run_copy, "m", reporter, parameters=["temprature=1"], client=server)
    with pytest.raises(RunFolderError):
        install(RunFolder(tmp_path), "m", reporter, client=server)
    with pytest.raises(ArtifactError, match=r"MergedQ8_0\.gguf"):
        install(run_copy, "m", reporter, quantization="Q8_0", client=server)
    edit(run_copy, "ADAPTER ./adapter\n")
    with pytest.raises(ArtifactError, match="ADAPTER"):
        install(run_copy, "m", reporter, client=server)
    run_copy.modelfile("Q4_K_M").write_text("FROM ./Merged.gguf\n")
    with pytest.raises(ArtifactError, match="its FROM"):
        install(run_copy, "m", reporter, client=server)
    with run_copy.gguf.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(ArtifactError, match="is not the file that the run made"):
        install(run_copy, "m", reporter, quantization="none", client=server)
    assert ollama_stand_in.requests == []


@pytest.mark.parametrize(
    ("version", "words", "other_words"),
    [
        ("0.33.0", "", "warning: "),
        ("0.17.1", "", "warning: "),
        ("0.17.0", "memory", "ramble"),
        ("0.0.0", "does not report its version", "warning: "),
    ],
)
def test_versions(
    version: str,
    words: str,
    other_words: str,
    ollama_stand_in: OllamaStandIn,
    run_copy: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ollama_stand_in.version = version
    install(run_copy, "m", reporter, client=OllamaClient(ollama_stand_in.host))
    output = capsys.readouterr().out
    assert words in output and other_words not in output


def test_too_old(ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter) -> None:
    ollama_stand_in.version = "0.5.4"
    with pytest.raises(OllamaError, match=r"needs 0\.5\.5"):
        install(run_copy, "m", reporter, client=OllamaClient(ollama_stand_in.host))
    assert [path for _, path, _ in ollama_stand_in.requests] == ["/api/version"]


@pytest.mark.parametrize(("version", "rambles"), [("0.29.9", True), ("0.30.0", False)])
def test_no_template(
    version: str,
    rambles: bool,
    ollama_stand_in: OllamaStandIn,
    run_copy: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ollama_stand_in.version = version
    run_copy.modelfile("Q4_K_M").write_text("FROM ./MergedQ4_K_M.gguf\nPARAMETER stop x\n")
    install(run_copy, "m", reporter, client=OllamaClient(ollama_stand_in.host))
    assert ("may ramble" in capsys.readouterr().out) == rambles


@pytest.mark.parametrize(
    ("fault", "words"), [("error in chat", "the model fell over"), ("chat breaks off", "interrupted")]
)
def test_an_interrupted_chat(
    fault: str, words: str, ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    server = OllamaClient(ollama_stand_in.host)
    install(run_copy, "m", reporter, client=server)
    chat = OllamaChat("m", client=server)
    ollama_stand_in.fault = fault
    with pytest.raises(OllamaError, match=words):
        answer_of(chat, "Hello?")
    ollama_stand_in.fault = ""
    answer_of(chat, "Again?")
    assert ollama_stand_in.prompts[-1].count("<|im_start|>user") == 1  # the failed turn is not part of the chat


def test_the_system_prompt_is_the_models_own(
    ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    server = OllamaClient(ollama_stand_in.host)
    install(run_copy, "m", reporter, system="Be terse.", client=server)
    answer_of(OllamaChat("m", client=server), "Hello?")
    answer_of(OllamaChat("m", "Be loud.", client=server), "Hello?")
    begin = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert ollama_stand_in.prompts[-2:] == [begin.format("Be terse."), begin.format("Be loud.")]


# ---------------------------------------------------------------- the command line


def test_from_the_command_line(
    ollama_stand_in: OllamaStandIn,
    run_copy: RunFolder,
    kolotune: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", ollama_stand_in.host)
    ask = ("--prompt", "Hello?", "--max-tokens", 3)
    code, output = kolotune("chat", run_copy.root, "--ollama", *ask)
    assert code == 2 and "kolotune install" in output
    code, output = kolotune("install", run_copy.root, "my-model", "--parameter", "temperature=0", "--json")
    assert code == 0 and '"event": "success"' in output and '"event": "progress"' in output
    answers = [
        kolotune("chat", run_copy.root, "--ollama", *ask),
        kolotune("chat", run_copy.root, "--ollama", "my-model", *ask),
        kolotune("chat", "--ollama", "my-model", *ask),
        kolotune("chat", run_copy.root, "--ollama", *ask, "--container"),  # it uses this machine's server nevertheless
    ]
    assert answers[0][0] == 0 and answers[0][1] and answers == [answers[0]] * 4
    assert f"0.33.0 at http://{ollama_stand_in.host}" in kolotune("doctor")[1]
    assert kolotune("chat", run_copy.root, "my-model", *ask)[0] == 2
    assert kolotune("chat", run_copy.root, "--ollama", "--base", *ask)[0] == 2
    assert kolotune("install", run_copy.root, "my-model")[0] == 2  # a different temperature: a different model
    assert kolotune("install", run_copy.root, "my-model", "--force", "--container")[0] == 0
    assert kolotune("uninstall", "my-model")[0] == 0 and ollama_stand_in.models == {}
    assert kolotune("chat", run_copy.root, "--ollama", *ask)[0] == 24
    ollama_stand_in.close()
    code, output = kolotune("install", run_copy.root, "my-model")
    assert code == 25 and "ollama serve" in output
    assert "there is no Ollama server" in " ".join(kolotune("doctor")[1].split())


# ---------------------------------------------------------------- the proof


def test_prompts_are_proven(
    ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    server = OllamaClient(ollama_stand_in.host)
    install(run_copy, "m", reporter, client=server)
    output = capsys.readouterr().out
    assert re.search(r"(\d+) of \1 prompts as trained \(rendered by TEMPLATE\), 2 of them read as \d\d+ tokens", output)
    ollama_stand_in.version = "0.11.9"
    install(run_copy, "m", reporter, client=server)
    assert "does not show prompts" in capsys.readouterr().out


def test_without_what_renders_prompts(
    ollama_stand_in: OllamaStandIn,
    run_copy: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client alone has no Jinja; and a run folder may lack its tokenizer."""
    server = OllamaClient(ollama_stand_in.host)
    monkeypatch.setattr(installing, "can_render", lambda: False)
    install(run_copy, "m", reporter, client=server)
    assert "prompts were not compared with training's; to do so" in capsys.readouterr().out
    monkeypatch.undo()
    for folder in (run_copy.tokenizer, run_copy.merged_model):
        shutil.rmtree(folder)
    install(run_copy, "m", reporter, client=server)
    assert "prompts were not compared: " in capsys.readouterr().out


TOOL_WORDS = "{#- tools, tool_calls, tool_response -#}"


@pytest.fixture(scope="module")
def finished_with_tools(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, reporter: PlainReporter
) -> RunFolder:
    """A finished run whose template is capable of tools, in words at least."""
    folder = tmp_path_factory.mktemp("tools")
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    jinja = template_text(base)
    (base / "chat_template.jinja").write_text(jinja + TOOL_WORDS, encoding="utf-8")
    chats = folder / "chats.jsonl"
    chats.write_text("".join(chat_line(number) for number in range(3)), encoding="utf-8")
    options = {
        "train_data": chats, "base_model": str(base), "output_dir": folder / "run", "epochs": 1, "lora_rank": 2,
        "checkpoint_steps": 0, "dtype": "fp32", "compare": False,
    }  # fmt: skip
    run_pipeline(configs.resolve((options, "test", folder)), reporter)
    return RunFolder(folder / "run")


def test_a_template_with_tools_is_served_by_the_gguf(
    ollama_stand_in: OllamaStandIn,
    finished_with_tools: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = OllamaClient(ollama_stand_in.host)
    install(finished_with_tools, "m", reporter, client=server)
    shown = server.show("m")
    assert shown is not None and TOOL_WORDS in str(shown["template"]) and "tools" in str(shown["capabilities"])
    assert "prompts as trained (rendered by the GGUF's template)" in capsys.readouterr().out
    install(finished_with_tools, "m", reporter, client=server)
    assert "unchanged" in capsys.readouterr().out
    ollama_stand_in.fault = "template forced"
    with pytest.raises(ConfigError, match="a different model"):
        install(finished_with_tools, "m", reporter, client=server)
    with pytest.raises(OllamaError) as error:
        install(finished_with_tools, "m", reporter, client=server, force=True)
    assert "OLLAMA_GO_TEMPLATE" in error.value.hint


def test_a_server_that_does_not_serve_tools(
    ollama_stand_in: OllamaStandIn,
    finished_with_tools: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ollama_stand_in.version = "0.24.0"
    install(finished_with_tools, "m", reporter, client=OllamaClient(ollama_stand_in.host))
    output = capsys.readouterr().out
    assert "does not serve this model's tools; 0.30.0 does" in output and "(rendered by TEMPLATE)" in output


def test_a_template_that_was_edited_is_noticed(
    ollama_stand_in: OllamaStandIn, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    path = run_copy.modelfile("Q4_K_M")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("{{- range $i", "X{{- range $i", 1), encoding="utf-8", newline="")
    with pytest.raises(OllamaError, match=r"prompts are not as trained; for a chat of .* Ollama has .*X<\|im_start"):
        install(run_copy, "m", reporter, client=OllamaClient(ollama_stand_in.host))
