"""llama.cpp's own server renders and tokenizes prompts."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.small_tokenizer import CHATML, small_gguf
from support.waiting import wait_until

from kolotune.foundation.errors import ArtifactError, TemplateError
from kolotune.llamacpp import prompt_server
from kolotune.llamacpp.prompt_server import PromptServer, SparseGguf
from kolotune.llamacpp.tokenizer_model import tokenizer_model

QUESTION = {"role": "user", "content": "Größe?"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    """A server for ChatML that adds a BOS."""
    with PromptServer(model(tmp_path_factory.mktemp("gguf"), "{{ bos_token }}" + CHATML, adds_bos=True)) as server:
        yield server


def model(folder: Path, template: str, *, adds_bos: bool = False) -> SparseGguf:
    return tokenizer_model(small_gguf(folder / "small.gguf", template, adds_bos=adds_bos))


def test_it_renders_and_tokenizes(server: PromptServer) -> None:
    text = server.render([{"role": "system", "content": "Be brief."}, QUESTION])
    assert (
        text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = server.tokens(text)
    assert (tokens[0], tokens[1]) == (256, 258), "a BOS, then a special token"
    assert tokens.count(258) == 3
    assert len(tokens) == 1 + len(text.replace("<|im_start|>", "1").replace("<|im_end|>", "2").encode())


def test_the_template_gets_what_a_request_gives(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for turn in messages %}{{ turn.content }}"
        "{% if turn.tool_calls %}{{ turn.tool_calls | tojson }}{% endif %}{% endfor %}{{ mood }}{{ date_string }}"
    )
    call = {"function": {"name": "find", "arguments": {"ort": "Köln", "a": 1}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "5"}
    before = datetime.date.today()
    with PromptServer(model(tmp_path, template)) as server:
        text = server.render([QUESTION, answer, result], TOOLS, mood="calm")
    assert '"name": "find"' in text and '"ort": "Köln"' in text and "calm" in text
    today = {day.strftime("%d %b %Y") for day in (before, datetime.date.today())}
    assert any(text.endswith(day) for day in today), text


def test_a_refusal_of_the_template_is_an_error(tmp_path: Path) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('One turn only') }}{% endif %}" + CHATML
    with PromptServer(model(tmp_path, template)) as server:
        with pytest.raises(TemplateError, match=r"refuses these messages: One turn only$"):
            server.render([QUESTION] * 2)
        assert "Größe?" in server.render([QUESTION]), "it can still be used"


def test_a_template_that_takes_too_much_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_server, "_CALL_SECONDS", 1.0)
    condition = "{% if messages[0].content == 'go' %}{% for a in range(9999999) %}{% for b in range(9999999) %}"
    template = condition + "{% endfor %}{% endfor %}{% endif %}" + CHATML
    with PromptServer(model(tmp_path, template)) as server:
        with pytest.raises(TemplateError, match="can't be used"):
            server.render([{"role": "user", "content": "go"}])
        with pytest.raises(TemplateError, match=r"it ends llama.cpp's server$"):
            server.render([QUESTION])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages[0].content", r"can't use the chat template: .*Expected"),
        ("{{ messages[7].content | upper }}{{ raise_exception('Never') }}", r"can't use the chat template: Never$"),
    ],
)
def test_a_template_that_llama_cpp_cannot_read(template: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=error):
        PromptServer(model(tmp_path, template))


def test_a_damaged_model(tmp_path: Path) -> None:
    gguf = model(tmp_path, CHATML)
    with pytest.raises(ArtifactError, match="can't load the tokenizer"):
        PromptServer(SparseGguf(gguf.header[:2000], gguf.size))


def test_only_this_process_can_ask(server: PromptServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    address = server.address
    assert address.startswith("http://127.0.0.1:")
    answer = httpx.post(f"{address}/apply-template", json={"messages": [QUESTION]}, trust_env=False)
    assert answer.status_code == 401
    assert "Größe?" in server.render([QUESTION])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_ends_with_its_parent_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    model(tmp_path, CHATML)
    program = """
        import sys, time
        from pathlib import Path
        from kolotune.llamacpp.tokenizer_model import read_tokenizer_model
        from kolotune.llamacpp.prompt_server import PromptServer
        server = PromptServer(read_tokenizer_model(Path(sys.argv[1])))
        print(server.address, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "small.gguf")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not _answers(address), "the server to end")
    assert list(temporary.iterdir()) == []


def _answers(address: str) -> bool:
    try:
        httpx.get(f"{address}/health", trust_env=False, timeout=1)
    except httpx.HTTPError:
        return False
    return True
