"""OpenAI's client asks `serve`, and llama.cpp's server itself: the same answers, or a difference that is meant."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import uvicorn
from support.waiting import wait_until

from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.app import make_app
from kolotune.serving.served_model import ServedModel

PARALLEL = 4
HELLO = {"role": "user", "content": "Hello! Größe?"}
ANSWER = {"role": "assistant", "content": "Fine"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
UNIT = {"type": "object", "properties": {"unit": {"enum": ["kelvin"]}}, "required": ["unit"]}
TOOL = {"type": "function", "function": {"name": "warm", "description": "Whether it is warm.", "parameters": UNIT}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "u", "schema": UNIT, "strict": True}}
LONG = [{"role": "user", "content": "word " * 9000}]


class Call(NamedTuple):
    """A call: what is asked for, how, and what is right, where that is known."""

    kind: str
    asked: dict[str, Any]
    right: Any = None


def chat(*turns: dict[str, Any], right: Any = None, **more: Any) -> Call:
    return Call("chat", {"messages": list(turns) or [HELLO], **GREEDY, **more}, right)


# The same answer from both servers.
CALLS = {
    "one question": chat(),
    "system": chat({"role": "system", "content": "Be brief."}, HELLO),
    "developer": chat({"role": "developer", "content": "Be brief."}, HELLO),
    "an empty system text": chat({"role": "system", "content": ""}, HELLO),
    "parts": chat({"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}),
    "several turns": chat(HELLO, ANSWER, HELLO),
    "continued": chat(HELLO, ANSWER),
    "seed": chat(temperature=1.2, seed=5),
    "another seed": chat(temperature=1.2, seed=6),
    "top_p": chat(temperature=1.2, seed=5, top_p=0.3),
    "max_completion_tokens": chat(max_tokens=None, max_completion_tokens=3),
    "penalties": chat(frequency_penalty=1.5, presence_penalty=1.5),
    "logit_bias": chat(logit_bias={"9906": 100}, max_tokens=3),
    "several answers": chat(n=2, temperature=1.2, seed=5),
    "log-probabilities": chat(logprobs=True, max_tokens=3),
    "top log-probabilities": chat(logprobs=True, top_logprobs=3, max_tokens=3),
    "json": chat(response_format={"type": "json_object"}),
    "schema": chat(response_format=SCHEMA, max_tokens=40, right='{"unit":"kelvin"}'),
    "text": chat(response_format={"type": "text"}),
    "fields about accounts": chat(user="me", store=False, metadata={"a": "b"}, service_tier="auto"),
    "stream": chat(stream=True),
    "stream with usage": chat(stream=True, stream_options={"include_usage": True}),
    "streamed answers": chat(stream=True, n=2, temperature=1.2, seed=5),
    "streamed schema": chat(stream=True, response_format=SCHEMA, max_tokens=40, right='{"unit":"kelvin"}'),
    "streamed log-probabilities": chat(stream=True, logprobs=True, top_logprobs=2, max_tokens=3),
    "completion": Call("completion", {"prompt": "Once", **GREEDY}),
    "completions": Call("completion", {"prompt": ["Once", "Twice"], **GREEDY}),
    "streamed completion": Call("completion", {"prompt": "Once", "stream": True, **GREEDY}),
    "embedding": Call("embedding", {"input": "Once"}),
    "embeddings": Call("embedding", {"input": ["Once", "Twice"]}),
    "embedding in numbers": Call("embedding", {"input": "Once", "encoding_format": "float"}),
    "too many answers": chat(n=PARALLEL + 1, right=400),
    "a text for a number": chat(temperature="hot", right=400),
    "no list": Call("chat", {"messages": "Hello", **GREEDY}, 400),
    "a prompt that is too long": Call("chat", {"messages": LONG, **GREEDY}, 400),
    "a schema that is none": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "none"}}}, right=400
    ),
}
# What llama.cpp's server answers as if nothing was wrong, and what comes of it here.
MEANT = {
    "no messages": Call("chat", {"messages": [], **GREEDY}, 400),
    "a role that was never trained": chat({"role": "usr", "content": "Hello"}, right=400),
    "tools, of which the template knows nothing": chat(tools=[TOOL], right=400),
    "functions": chat(functions=[{"name": "warm", "parameters": UNIT}], right=400),
}


class Servers(NamedTuple):
    """Clients of both servers."""

    ours: openai.OpenAI
    bare: openai.OpenAI
    model: ServedModel


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def servers(finished: Config) -> Iterator[Servers]:
    """Both servers for the f16 file of the finished run."""
    import xllamacpp

    with ServedModel(RunFolder(finished.output_dir), "none", parallel=PARALLEL) as model:
        app = make_app([model], only_here=True, reporter=PlainReporter())
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the server to start", pause=0.01)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model.gguf)
        parameters.hostnames, parameters.port = ["127.0.0.1"], 0
        parameters.n_parallel, parameters.n_ctx = PARALLEL, PARALLEL * model.server.context
        parameters.embedding = parameters.kv_unified = True
        parameters.kv_unified_per_slot = model.server.context
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.verbosity, parameters.ui, parameters.warmup = 1, False, False
        bare = xllamacpp.Server(parameters)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Servers(client_of(f"http://127.0.0.1:{port}"), client_of(bare.listening_address), model)
        server.should_exit = True
        thread.join(10)


def outcome(client: openai.OpenAI, call: Call) -> Any:
    """Return what a call brings that does not depend on time and names; the status of a refusal."""
    create: Any = {
        "chat": client.chat.completions.create,
        "completion": client.completions.create,
        "embedding": client.embeddings.create,
    }[call.kind]
    try:
        response = create(model="run", **call.asked)
        if call.asked.get("stream"):
            return together([chunk.model_dump() for chunk in response])
        return plain(response.model_dump())
    except openai.APIStatusError as error:
        return error.status_code


def plain(response: dict[str, Any]) -> dict[str, Any]:
    for name in ("id", "created", "model", "system_fingerprint", "timings"):
        response.pop(name, None)
    if response.get("usage"):
        response["usage"].pop("prompt_tokens_details", None)
    for choice in response.get("choices", []):
        for made in (choice.get("message") or {}).get("tool_calls") or []:
            made.pop("id")
    for entry in response["data"] if response.get("object") == "list" else []:
        entry["embedding"] = [round(value, 2) for value in entry["embedding"]]
    return rounded(response)


def rounded(value: Any) -> Any:
    """Round log-probabilities: several requests that are computed together differ in the last digits."""
    if isinstance(value, dict):
        return {key: round(each, 2) if key == "logprob" else rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together."""
    texts: dict[int, str] = {}
    reasons, calls, logprobs, usage = {}, {}, [], None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            delta, index = choice.get("delta") or {}, choice["index"]
            texts[index] = texts.get(index, "") + (delta.get("content") or choice.get("text") or "")
            reasons[index] = choice["finish_reason"] or reasons.get(index)
            logprobs += (choice.get("logprobs") or {}).get("content") or []
            for made in delta.get("tool_calls") or []:
                name, arguments = calls.get(made["index"], ("", ""))
                function = made["function"]
                calls[made["index"]] = (
                    name + (function.get("name") or ""),
                    arguments + (function.get("arguments") or ""),
                )
    tokens = usage and usage["completion_tokens"]
    return {"texts": texts, "reasons": reasons, "calls": calls, "logprobs": rounded(logprobs), "tokens": tokens}


def found(result: Any) -> Any:
    """Return the part of an outcome that `Call.right` is about: a status, calls, or a text."""
    if isinstance(result, int):
        return result
    if "texts" in result:
        pairs = list(result["calls"].values())
        text = result["texts"][0]
    else:
        message = result["choices"][0]["message"]
        pairs = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"] or []]
        text = message["content"]
    return [(name, json.loads(arguments)) for name, arguments in pairs] or "".join(text.split())


@pytest.mark.parametrize("name", CALLS)
def test_the_same_answer_as_llama_cpps_server(servers: Servers, name: str) -> None:
    call = CALLS[name]
    ours = outcome(servers.ours, call)
    assert ours == outcome(servers.bare, call)
    assert call.right is None or found(ours) == call.right


@pytest.mark.parametrize("name", MEANT)
def test_what_llama_cpp_ignores_is_refused(servers: Servers, name: str) -> None:
    call = MEANT[name]
    assert outcome(servers.ours, call) == call.right
    assert isinstance(outcome(servers.bare, call), dict)


def test_errors_say_what_is_wrong(servers: Servers) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        servers.ours.chat.completions.create(model="run", messages=LONG)  # type: ignore[arg-type]
    body: Any = error.value.body
    assert error.value.code == "context_length_exceeded" and body["type"] == "invalid_request_error"
    assert body["n_ctx"] == servers.model.server.context and body["n_prompt_tokens"] > 9000
    url = f"{servers.ours.base_url}chat/completions"
    answer = httpx.post(url, content=b"{", headers={"Content-Type": "application/json"}, trust_env=False)
    assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]


def test_fields_without_effect_are_named_in_a_header(servers: Servers) -> None:
    for stream in (False, True):
        raw = servers.ours.chat.completions.with_raw_response.create(
            model="run",
            messages=[HELLO],  # type: ignore[list-item]
            stream=stream,
            max_tokens=2,
            extra_body={"temprature": 0, "chat_template_kwargs": {"enable_thinking": True}},
        )
        assert raw.headers["x-unused-fields"] == "temprature, chat_template_kwargs.enable_thinking"
    assert "x-unused-fields" not in servers.ours.models.with_raw_response.list().headers


def test_a_last_turn_of_the_assistant_is_continued(servers: Servers) -> None:
    """The prompt ends with the turn, without what ends an answer; other prompts end with the opening of one."""
    base = str(servers.ours.base_url).removesuffix("v1/")

    def prompt(*messages: dict[str, Any]) -> str:
        answer: Any = servers.ours.post(f"{base}apply-template", body={"messages": messages}, cast_to=object)
        return str(answer["prompt"])

    assert prompt(HELLO, ANSWER) == prompt(HELLO) + str(ANSWER["content"])


def test_the_routes_for_tokens_and_prompts(servers: Servers) -> None:
    post: Any = servers.ours.post
    base = str(servers.ours.base_url).removesuffix("v1/")
    ids = post(f"{base}tokenize", body={"content": "Größe"}, cast_to=object)["tokens"]
    assert post(f"{base}detokenize", body={"tokens": ids}, cast_to=object)["content"] == "Größe"
    prompt = post(f"{base}apply-template", body={"messages": [HELLO]}, cast_to=object)["prompt"]
    assert prompt.endswith("assistant\n") and HELLO["content"] in prompt
    for closed in ("slots", "props", "lora-adapters", "completion"):
        with pytest.raises(openai.NotFoundError):
            post(f"{base}{closed}", body={}, cast_to=object)


def test_eight_at_once_and_clients_that_go_away(servers: Servers) -> None:
    """Two streams are left, one request is given up while it is computed; eight others get whole answers.

    What is computed together differs in its last digits, so that sooner or later a random model takes another turn.
    """
    calls = [chat(temperature=1.2, seed=seed) for seed in range(8)]
    wanted = [outcome(servers.ours, call) for call in calls]
    create: Any = servers.ours.chat.completions.create
    for _ in range(2):
        with create(model="run", messages=[HELLO], max_tokens=4000, stream=True) as stream:
            next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        create(model="run", messages=[HELLO], max_tokens=4000, timeout=0.5, extra_body={"ignore_eos": True})
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda call: outcome(servers.ours, call), calls))
    assert [answer["usage"] for answer in answers] == [answer["usage"] for answer in wanted]
    begins, wanted_begins = (
        [answer["choices"][0]["message"]["content"][:5] for answer in each] for each in (answers, wanted)
    )
    assert len(set(wanted_begins)) == 8, "a request that gets another one's answer is seen"
    assert sum(one == other for one, other in zip(begins, wanted_begins, strict=True)) >= 6
    assert time.monotonic() - started < 30


def test_a_crash_is_reported_and_the_next_request_answered(servers: Servers) -> None:
    create: Any = servers.ours.chat.completions.create
    wanted = outcome(servers.ours, chat())
    stream = iter(create(model="run", messages=[HELLO], max_tokens=4000, stream=True, extra_body={"ignore_eos": True}))
    next(stream)
    os.kill(servers.model.server.process_id, signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"llama.cpp ended while it computed \(signal 9\)") as error:
        list(stream)
    assert error.value.code == "model_crashed"
    assert outcome(servers.ours, chat()) == wanted
