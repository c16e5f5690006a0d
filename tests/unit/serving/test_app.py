"""The server, called by OpenAI's own client: it answers as `chat` does, and the Modelfile applies."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from kolotune.foundation.config import DEFAULT_HOST, Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.app import make_app, serve
from kolotune.serving.served_model import ServedModel
from kolotune.serving.terminal_chat import open_chat

QUESTION = [{"role": "user", "content": 'What is "2" plus 1? 🙂'}]
SAMPLING: dict[str, Any] = {"temperature": 1.5, "seed": 7, "max_tokens": 24}
Client = Callable[..., openai.OpenAI]


@pytest.fixture
def client_of() -> Iterator[Client]:
    """A function that serves a model in this process and returns a client."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(*models: ServedModel) -> openai.OpenAI:
        app = make_app(models, only_here=True, reporter=PlainReporter())
        config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        http = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, http_client=http)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def model(finished: Config) -> Iterator[ServedModel]:
    # The f16 file: what of a prompt is cached, and what others ask, changes the answers of quantized ones.
    with ServedModel(RunFolder(finished.output_dir), "none", parallel=4) as model:
        yield model


def ids_of(model: ServedModel, *turns: dict[str, str]) -> list[int]:
    request, _ = model.defaults.apply("/apply-template", {"messages": list(turns)})
    return model.server.tokens(model.server.prompt(request), adds_special=True)


def whole(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "any", "messages": QUESTION, **SAMPLING, **more})


def streamed(client: openai.OpenAI, **more: Any) -> tuple[str, Any, int]:
    """Return text, finish reason and number of tokens of a streamed answer."""
    text, reason, tokens = "", None, 0
    for event in whole(client, stream=True, stream_options={"include_usage": True}, **more):
        if event.usage:
            assert not event.choices
            tokens = event.usage.completion_tokens
        for choice in event.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, tokens


def test_the_server_answers_as_chat_does(
    model: ServedModel, finished: Config, client_of: Client, reporter: PlainReporter
) -> None:
    with open_chat(RunFolder(finished.output_dir), reporter, quantization="none") as chat:
        wanted = "".join(chat.ask(str(QUESTION[0]["content"]), **SAMPLING))
        assert len(set(wanted)) > 10
        second = "".join(chat.ask("And?", **SAMPLING))
    client = client_of(model)
    answer = whole(client)
    assert answer.choices[0].message.content == wanted and answer.model == "run"
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 24
    assert streamed(client) == (wanted, "length", 24)
    # The second turn of a chat.
    more = [*QUESTION, {"role": "assistant", "content": wanted}, {"role": "user", "content": "And?"}]
    assert whole(client, messages=more).choices[0].message.content == second
    assert [entry.id for entry in client.models.list()] == ["run"] and client.models.retrieve("any").id == "run"


def test_the_prompt_is_the_trained_one(model: ServedModel, finished: Config) -> None:
    """The tokens are those of transformers for the text of the trained template, with the same number of BOS."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(RunFolder(finished.output_dir).tokenizer)
    system = {"role": "system", "content": "Be\n  terse."}
    for turns in ([QUESTION[0]], [system, QUESTION[0]], [QUESTION[0], {"role": "assistant", "content": "3"}, system]):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert ids_of(model, *turns) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answers_end_at_stop_strings_and_limits(model: ServedModel, client_of: Client) -> None:
    client = client_of(model)
    text = str(whole(client).choices[0].message.content)
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    before = text[: text.index(stop)]
    for wanted in (stop, ["never written", stop]):
        answer = whole(client, stop=wanted).choices[0]
        assert (answer.message.content, answer.finish_reason) == (before, "stop")
        assert streamed(client, stop=wanted)[:2] == (before, "stop")
    assert whole(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    different = {str(whole(client, seed=seed).choices[0].message.content) for seed in (1, 2, None, None)}
    assert len(different) == 4 and text not in different


def test_the_modelfile_applies(run_copy: RunFolder, client_of: Client, model: ServedModel) -> None:
    plain = str(whole(client_of(model)).choices[0].message.content)
    stop = plain[10:13]
    with run_copy.modelfile("Q4_K_M").open("a", encoding="utf-8", newline="") as file:
        file.write('SYSTEM """Be\nterse."""\nMESSAGE user Hello: you\nMESSAGE assistant Hi.\n')
        file.write(f'PARAMETER num_ctx 100\nPARAMETER num_keep 1\nPARAMETER stop """{stop}"""\n')
        file.write("PARAMETER num_predict 4\nPARAMETER temperature 1.5\nPARAMETER seed 7\nPARAMETER top_k 1\n")
    with ServedModel(run_copy, "q4_k_m") as edited:
        check_the_modelfile(edited, model, client_of)


def check_the_modelfile(edited: ServedModel, model: ServedModel, client_of: Client) -> None:
    assert edited.defaults.unused == ["num_keep"]
    system, loud = {"role": "system", "content": "Be\nterse."}, {"role": "system", "content": "Be loud."}
    own = [{"role": "user", "content": "Hello: you"}, {"role": "assistant", "content": "Hi."}]
    assert ids_of(edited, *QUESTION) == ids_of(model, system, *own, *QUESTION)
    assert ids_of(edited, loud, *QUESTION) == ids_of(model, *own, loud, *QUESTION)
    client = client_of(edited)
    answer = whole(client, temperature=None, seed=None, max_tokens=None)
    assert answer.usage.completion_tokens <= 4
    same = whole(client, temperature=0, max_tokens=4)  # top_k 1 leaves only the most likely token
    assert answer.choices[0].message.content == same.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as error:
        whole(client, messages=[{"role": "user", "content": "word " * 250}])
    assert error.value.code == "context_length_exceeded"


def test_errors_for_clients(model: ServedModel, client_of: Client) -> None:
    client = client_of(model)
    with pytest.raises(openai.BadRequestError, match="functions: not supported"):
        whole(client, functions=[{"name": "f"}])
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.images.generate(prompt="a")
    address = f"{client.base_url}chat/completions"
    body = json.dumps({"messages": QUESTION})
    with httpx.Client(trust_env=False) as web_page:
        assert web_page.post(address, content=body, headers={"Content-Type": "text/plain"}).status_code == 415
        for name in ("Host", "Origin"):
            headers = {name: "evil.example", "Content-Type": "application/json"}
            status = web_page.post(address, content=b"{}", headers=headers).status_code
            assert status == (403 if name == "Host" else 400)
        assert "access-control-allow-origin" not in web_page.get(f"{client.base_url}models").headers


def test_several_clients_at_once_and_one_that_disconnects(model: ServedModel, client_of: Client) -> None:
    client = client_of(model)
    wanted = {seed: str(whole(client, seed=seed).choices[0].message.content) for seed in range(4)}
    interrupted = whole(client, stream=True, max_tokens=1500)
    next(iter(interrupted))
    interrupted.close()
    with ThreadPoolExecutor(4) as pool:
        got = dict(zip(wanted, pool.map(lambda seed: streamed(client, seed=seed)[0], wanted), strict=True))
    # What is computed together differs in its last digits: a random model may take another turn.
    assert sum(got[seed] == wanted[seed] for seed in wanted) >= 2 and all(got.values())


@pytest.mark.parametrize(("host", "sign"), [(DEFAULT_HOST, signal.SIGINT), ("0.0.0.0", signal.SIGTERM)])
def test_signals_stop_the_server(host: str, sign: signal.Signals, finished: Config) -> None:
    argv = [sys.executable, "-m", "kolotune", "serve", str(finished.output_dir), "--port=0", f"--host={host}", "--json"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    events = []
    for line in child.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "result":
            break
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert ("no password" in warnings[0]) if host != DEFAULT_HOST else not warnings
    http = httpx.Client(trust_env=False)
    url = events[-1]["url"].replace("0.0.0.0", "127.0.0.1")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
    stream = iter(whole(client, stream=True, max_tokens=2000))
    for _ in range(3):
        next(stream)
    child.send_signal(sign)  # in the middle of an answer
    rest, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and "no longer served" in rest
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_request_names_one_of_several_runs(
    model: ServedModel, finished: Config, client_of: Client, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    shutil.copytree(finished.output_dir, tmp_path / "other")
    with RunFolder(tmp_path / "other").modelfile().open("a", encoding="utf-8") as file:
        file.write("PARAMETER num_predict 2\n")
    with ServedModel(RunFolder(tmp_path / "other"), "none") as other:
        client = client_of(model, other)
        assert [entry.id for entry in client.models.list()] == ["run", "other"]
        for name, tokens in (("run", 24), ("other", 2)):
            answer = whole(client, model=name, max_tokens=24 if name == "run" else None)
            assert (answer.model, answer.usage.completion_tokens) == (name, tokens)
        with pytest.raises(openai.NotFoundError, match="must be one of run, other") as error:
            whole(client, model="any")
        assert error.value.code == "model_not_found"
    shutil.move(tmp_path / "other", tmp_path / "run")
    code, output = kolotune("serve", finished.output_dir, tmp_path / "run")
    assert code == 2 and "several runs have the name 'run'" in output


def test_a_run_with_a_comma_in_its_name(finished: Config, client_of: Client, tmp_path: Path) -> None:
    """An option of llama.cpp's server would read two names."""
    run = shutil.copytree(finished.output_dir, tmp_path / "one, two")
    with ServedModel(RunFolder(run), "none") as model:
        client = client_of(model)
        assert [entry.id for entry in client.models.list()] == ["one, two"] == [whole(client).model]
        assert {event.model for event in whole(client, stream=True)} == {"one, two"}


def test_unusable_addresses(model: ServedModel, reporter: PlainReporter, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ConfigError, match="can't listen"):
        serve([model], "127.0.0.1", listener.getsockname()[1], reporter)
    with pytest.raises(ConfigError, match="can't listen"):
        serve([model], "no such host.example", 0, reporter)
