"""Installing a run's model in Ollama: what arrives, what is refused, and what happens when something fails.

With OLLAMA_HOST set, the tests that need no faults run against that server, with random model names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_ollama import FakeOllama, only_real

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, OllamaError, RunFolderError
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.chat import OllamaChat
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import install, installed_name, uninstall
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

    install(run_copy, name, reporter, parameters=PLAIN, client=OllamaClient(any_ollama))
    chat, here = OllamaChat(name, client=OllamaClient(any_ollama)), open_chat(run_copy, reporter)
    for question in QUESTIONS:  # the second one with the first in its history
        answer = answer_of(chat, question)
        assert len(set(answer)) > 10
        assert answer == answer_of(here, question) or REAL  # a real server has a different random generator
    # The prompt has the same length: the template is the trained one, and there is one BOS or none.
    turns = [{"role": "user", "content": QUESTIONS[1]}]
    response = ollama.Client(any_ollama, trust_env=False).chat(name, turns, options={"num_predict": 1})
    assert response.prompt_eval_count == len(here._model.tokens(here._template.render(turns, None, True)))
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
    """Without TEMPLATE, a server from 0.30 on uses the GGUF's: the prompt has the same length."""
    import ollama

    lines = run_copy.modelfile("Q4_K_M").read_text(encoding="utf-8").split("\n")
    run_copy.modelfile("Q4_K_M").write_text("\n".join([lines[0], *(x for x in lines if x.startswith("PARAMETER"))]))
    install(run_copy, name, reporter, client=OllamaClient(any_ollama))
    turns = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hello?"}]
    response = ollama.Client(any_ollama).chat(name, turns, options={"num_predict": 1})
    here = open_chat(run_copy, reporter)
    assert response.prompt_eval_count == len(here._model.tokens(here._template.render(turns, None, True)))


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
        ("another stop", "stop "),
        ("other weights", "weights 000000000000"),
        ("forgets", "there is no such model"),
    ],
)
def test_faults(
    fault: str, words: str, fake_ollama: FakeOllama, finished: Config, reporter: PlainReporter, tmp_path: Path
) -> None:
    run, server = RunFolder(finished.output_dir), OllamaClient(fake_ollama.host, patience=2)
    fake_ollama.fault = fault
    with pytest.raises(OllamaError) as error:
        install(run, "m", reporter, client=server, force=True)
    assert words in error.value.cause and error.value.exit_code == 24 and error.value.hint
    assert not run.installed.exists()
    fake_ollama.fault = ""
    install(run, "m", reporter, client=server, force=True)
    run.installed.unlink()


def test_weights_are_sent_once(fake_ollama: FakeOllama, run_copy: RunFolder, reporter: PlainReporter) -> None:
    server = OllamaClient(fake_ollama.host)
    install(run_copy, "one", reporter, client=server)
    install(run_copy, "two", reporter, client=server)
    assert (
        fake_ollama.count_requests("POST", "/api/blobs/") == 1
        and fake_ollama.count_requests("HEAD", "/api/blobs/") == 2
    )
    install(run_copy, "two", reporter, client=server)
    assert fake_ollama.count_requests("POST", "/api/create") == 2


def test_bad_requests_are_refused_before_anything_is_sent(
    fake_ollama: FakeOllama, run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    server = OllamaClient(fake_ollama.host)
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
    assert fake_ollama.requests == []


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
    fake_ollama: FakeOllama,
    run_copy: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_ollama.version = version
    install(run_copy, "m", reporter, client=OllamaClient(fake_ollama.host))
    output = capsys.readouterr().out
    assert words in output and other_words not in output


def test_too_old(fake_ollama: FakeOllama, run_copy: RunFolder, reporter: PlainReporter) -> None:
    fake_ollama.version = "0.5.4"
    with pytest.raises(OllamaError, match=r"needs 0\.5\.5"):
        install(run_copy, "m", reporter, client=OllamaClient(fake_ollama.host))
    assert [path for _, path, _ in fake_ollama.requests] == ["/api/version"]


@pytest.mark.parametrize(("version", "rambles"), [("0.29.9", True), ("0.30.0", False)])
def test_no_template(
    version: str,
    rambles: bool,
    fake_ollama: FakeOllama,
    run_copy: RunFolder,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_ollama.version = version
    run_copy.modelfile("Q4_K_M").write_text("FROM ./MergedQ4_K_M.gguf\nPARAMETER stop x\n")
    install(run_copy, "m", reporter, client=OllamaClient(fake_ollama.host))
    assert ("may ramble" in capsys.readouterr().out) == rambles


@pytest.mark.parametrize(
    ("fault", "words"), [("error in chat", "the model fell over"), ("chat breaks off", "interrupted")]
)
def test_an_interrupted_chat(
    fault: str, words: str, fake_ollama: FakeOllama, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    server = OllamaClient(fake_ollama.host)
    install(run_copy, "m", reporter, client=server)
    chat = OllamaChat("m", client=server)
    fake_ollama.fault = fault
    with pytest.raises(OllamaError, match=words):
        answer_of(chat, "Hello?")
    fake_ollama.fault = ""
    answer_of(chat, "Again?")
    assert fake_ollama.prompts[-1].count("<|im_start|>user") == 1  # the failed turn is not part of the chat


def test_the_system_prompt_is_the_models_own(
    fake_ollama: FakeOllama, run_copy: RunFolder, reporter: PlainReporter
) -> None:
    server = OllamaClient(fake_ollama.host)
    install(run_copy, "m", reporter, system="Be terse.", client=server)
    answer_of(OllamaChat("m", client=server), "Hello?")
    answer_of(OllamaChat("m", "Be loud.", client=server), "Hello?")
    begin = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert fake_ollama.prompts == [begin.format("Be terse."), begin.format("Be loud.")]


# ---------------------------------------------------------------- the command line


def test_from_the_command_line(
    fake_ollama: FakeOllama,
    run_copy: RunFolder,
    kolotune: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.host)
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
    assert f"0.33.0 at http://{fake_ollama.host}" in kolotune("doctor")[1]
    assert kolotune("chat", run_copy.root, "my-model", *ask)[0] == 2
    assert kolotune("chat", run_copy.root, "--ollama", "--base", *ask)[0] == 2
    assert kolotune("install", run_copy.root, "my-model")[0] == 2  # a different temperature: a different model
    assert kolotune("install", run_copy.root, "my-model", "--force", "--container")[0] == 0
    assert kolotune("uninstall", "my-model")[0] == 0 and fake_ollama.models == {}
    assert kolotune("chat", run_copy.root, "--ollama", *ask)[0] == 24
    fake_ollama.close()
    code, output = kolotune("install", run_copy.root, "my-model")
    assert code == 25 and "ollama serve" in output
    assert "there is no Ollama server" in " ".join(kolotune("doctor")[1].split())
