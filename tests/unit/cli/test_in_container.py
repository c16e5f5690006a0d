"""``--container`` on the command line: the request, and what the verb in the container gets."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import typer
import yaml

from kolotune.cli.app import app
from kolotune.cli.container_request import ContainerRequest, parse_request
from kolotune.cli.in_container import VerbCall, value_options
from kolotune.cli.parameters import roles_of
from kolotune.foundation.errors import ConfigError, DataError
from kolotune.foundation.secrets import Secret
from kolotune.runners.container import names

COMMAND: Any = typer.main.get_command(app)


class RecordingSender:
    """Instead of the sender: records what would be sent."""

    def __init__(self) -> None:
        self.sent: list[Path] = []
        self.texts: dict[str, str] = {}

    def send(self, host: Path) -> PurePosixPath:
        self.sent.append(host)
        return names.INPUTS / "0" / host.name

    def send_text(self, name: str, text: str, host: Path) -> PurePosixPath:
        self.texts[name] = text
        return names.INPUTS / "1" / name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("")
    (tmp_path / "run").mkdir()
    return tmp_path


def call_inside(*arguments: str) -> tuple[VerbCall, RecordingSender, list[str]]:
    """Return the verb as it would be called in the container, where its run folder is /runs/R."""
    call, sender = VerbCall(COMMAND, arguments), RecordingSender()
    run = call.run_folder()
    inside = (run[0], PurePosixPath("/runs/R")) if run else None
    argv = call.argv(sender, inside, call.new_folder())  # type: ignore[arg-type]
    return call, sender, argv


def run_folder_of(call: VerbCall) -> Path | None:
    found = call.run_folder()
    return found[0] if found else None


def requested(line: Sequence[str]) -> ContainerRequest | None:
    return parse_request(line, value_options(COMMAND))


@pytest.mark.parametrize(
    ("line", "name", "rest"),
    [
        ("run chats.jsonl --container", names.DEFAULT_NAME, "run chats.jsonl"),
        ("run --container chats.jsonl", names.DEFAULT_NAME, "run chats.jsonl"),
        ("run --container other chats.jsonl", "other", "run chats.jsonl"),
        ("run --container --epochs 1 chats.jsonl", names.DEFAULT_NAME, "run --epochs 1 chats.jsonl"),
        ("run --container=chats.jsonl x", "chats.jsonl", "run x"),
        ("--container status", names.DEFAULT_NAME, "status"),
        ("--container box status", "box", "status"),
        ("status --container status", "status", "status"),
        ("status run --container", names.DEFAULT_NAME, "status run"),
        ("--container=box chat --system --container run", "box", "chat --system --container run"),
        ("chat --system=--container --container box", "box", "chat --system=--container"),
        ("check --container -- --container", names.DEFAULT_NAME, "check -- --container"),
        ("chat --base --container box", "box", "chat --base"),
    ],
)
def test_the_name_of_the_container(line: str, name: str, rest: str, here: Path) -> None:
    assert requested(line.split()) == ContainerRequest(rest.split(), name, False, False)


@pytest.mark.parametrize(
    "line", ["run chats.jsonl", "run --leave-inside", "check -- --container", "chat --system --container"]
)
def test_a_line_without_a_request(line: str, here: Path) -> None:
    assert requested(line.split()) is None


def test_options_for_the_results(here: Path) -> None:
    found = requested(["run", "--leave-inside", "--container", "--with-checkpoints", "x"])
    assert found == ContainerRequest(["run", "x"], names.DEFAULT_NAME, True, True)


def test_every_path_of_every_verb_has_a_role() -> None:
    """Without one, a new parameter that names a file would not reach the container."""
    verbs = [info.callback for info in app.registered_commands]
    paths = {
        (verb.__name__, name)
        for verb in map(inspect.unwrap, filter(None, verbs))
        for name, hint in get_type_hints(verb, include_extras=True).items()
        if "Path" in str(hint) or name in ("base_model", "train_data", "eval_data", "chat_template", "output_dir")
    }
    assert len(paths) > 40 and ("run", "train_data") in paths and ("status", "run") in paths
    roles = {verb.__name__: roles_of(verb) for verb in map(inspect.unwrap, filter(None, verbs))}
    assert not [(verb, name) for verb, name in paths if name not in roles[verb]]


def test_a_file_that_is_written_while_the_verb_runs_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="chat --ratings: what runs in a container writes no file"):
        call_inside("chat", "--ratings", "ratings.jsonl")


def test_inputs_run_folder_and_values(here: Path) -> None:
    (here / "held.jsonl").write_text("")
    (here / "base").mkdir()
    (here / "own.jinja").write_text("")
    line = ["run", "chats.jsonl", "--eval-data", "held.jsonl", "--base-model", "base", "--epochs", "2"]
    line += ["--chat-template", "own.jinja"]
    call, sender, argv = call_inside(*line, "--system", "-x\n'; rm", "--no-compare", "--eval-split", "0")
    assert sender.sent == [here / "chats.jsonl", here / "held.jsonl", here / "own.jinja", here / "base"]
    assert run_folder_of(call) == here / "outputs"
    assert set(argv) == {
        "run", "--json", "--eval-data=/runs/.inputs/0/held.jsonl", "--base-model=/runs/.inputs/0/base", "--epochs=2",
        "--chat-template=/runs/.inputs/0/own.jinja",
        "--system=-x\n'; rm", "--no-compare", "--eval-split=0", "--output-dir=/runs/R", "--",
        "/runs/.inputs/0/chats.jsonl",
    }  # fmt: skip
    assert argv[0] == "run" and argv[-2:] == ["--", "/runs/.inputs/0/chats.jsonl"]


def test_a_name_of_a_base_model_stays_a_name(here: Path) -> None:
    _, sender, argv = call_inside("run", "chats.jsonl", "--base-model", "meta-llama/Llama-3.2-1B-Instruct")
    assert "--base-model=meta-llama/Llama-3.2-1B-Instruct" in argv and sender.sent == [here / "chats.jsonl"]


@pytest.mark.parametrize("verb", ["status", "train", "merge", "convert", "quantize", "modelfile", "chat"])
def test_verbs_of_a_run_folder(verb: str, here: Path) -> None:
    for arguments, folder in (([verb], "outputs"), ([verb, "run"], "run")):
        call, _, argv = call_inside(*arguments)
        assert run_folder_of(call) == here / folder and argv[-2:] == ["--", "/runs/R"]


def test_a_config_file_goes_in_with_its_own_paths(here: Path) -> None:
    folder = here / "conf"
    folder.mkdir()
    (folder / "c.jsonl").write_text("")
    (folder / "secret").write_text("hf_x")
    (folder / "own.jinja").write_text("")
    (folder / "k.yaml").write_text(
        "train-data: c.jsonl\noutput_dir: made\nhf_token: secret\nepochs: 0\nbase_model: ./base\nlora-rank: 2\n"
        "chat-template: own.jinja\n"
    )
    call, sender, argv = call_inside("run", "--config", "conf/k.yaml")
    assert run_folder_of(call) == folder / "made" and call.token() == Secret("hf_x")
    assert sender.sent == [folder / "c.jsonl", folder / "base", folder / "own.jinja"]
    assert yaml.safe_load(sender.texts["kolotune.yaml"]) == {
        "train_data": ["/runs/.inputs/0/c.jsonl"], "epochs": 0, "base_model": "/runs/.inputs/0/base", "lora_rank": 2,
        "chat_template": "/runs/.inputs/0/own.jinja",
    }  # fmt: skip
    assert "--config=/runs/.inputs/1/kolotune.yaml" in argv and not [each for each in argv if "token" in each]


def test_a_token_is_in_no_argument(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "secret").write_text("hf_secret\n")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    call, _, argv = call_inside("run", "chats.jsonl", "--hf-token", "secret")
    assert call.token() == Secret("hf_secret") and not [each for each in argv if "secret" in each]
    assert call_inside("run", "chats.jsonl")[0].token() == Secret("hf_other")
    monkeypatch.delenv("HF_TOKEN")
    assert not call_inside("status")[0].token()


def test_a_merge_elsewhere(here: Path) -> None:
    call, sender, argv = call_inside("merge", "--adapter", "run", "--out", "made", "--base", "smollm2-135m")
    assert run_folder_of(call) is None and sender.sent == [here / "run"]
    assert "--base=smollm2-135m" in argv
    made = next(PurePosixPath(each.partition("=")[2]) for each in argv if each.startswith("--out="))
    assert made.is_relative_to(names.OUTSIDE) and made.name.startswith("made-")
    with pytest.raises(ConfigError, match="exists"):
        call_inside("merge", "--adapter", "run", "--out", "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "chats.jsonl", "--epochs", "x"], "epochs"),
        (["run", "chats.jsonl", "--epochs", "-1", "--seed", "y"], "seed"),
        (["train", "--lora-rank", "0"], "lora-rank"),
        (["run", "--config", "none.yaml"], "none.yaml"),
        (["run", "chats.jsonl", "--hf-token", "hf_abc"], "never the token itself"),
    ],
)
def test_a_wrong_option_is_reported_before_anything_is_sent(arguments: list[str], words: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        call_inside(*arguments)


def test_a_data_set_of_the_hub_stays_a_name(here: Path) -> None:
    """It is downloaded in the container, so that the run's manifest has its revision."""
    name = "hf://datasets/owner/name@main/data/train-*.parquet"
    (here / "k.yaml").write_text(f"train-data: ['{name}', chats.jsonl]\neval-data: 'hf://datasets/owner/other'\n")
    _, sender, argv = call_inside("run", name, "chats.jsonl", "--eval-data", "hf://datasets/owner/other")
    assert argv[-3:] == ["--", name, "/runs/.inputs/0/chats.jsonl"]
    assert "--eval-data=hf://datasets/owner/other" in argv and sender.sent == [here / "chats.jsonl"]
    _, sender, _ = call_inside("run", "--config", "k.yaml")
    assert yaml.safe_load(sender.texts["kolotune.yaml"]) == {
        "train_data": [name, "/runs/.inputs/0/chats.jsonl"], "eval_data": ["hf://datasets/owner/other"],
    }  # fmt: skip


def test_what_comes_by_a_pipe_goes_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once, here, into a file that is named by its content."""
    monkeypatch.setenv("KOLOTUNE_CACHE", str(here / "cache"))
    for line in ("run -", "check --eval-data - chats.jsonl"):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"{}\n")))
        call, sender, argv = call_inside(*line.split())
        (piped,) = [file for file in sender.sent if file.name != "chats.jsonl"]
        assert piped.read_bytes() == b"{}\n" and piped.parent == here / "cache" / "piped"
        assert f"/runs/.inputs/0/{piped.name}" in " ".join(argv) and "-" not in argv
        assert call.config is not None and piped in (*call.config.train_data, *call.config.eval_data)


def test_the_files_of_a_folder_go_in(here: Path) -> None:
    (here / "set" / "data").mkdir(parents=True)
    for name in ("b.jsonl", "a.parquet", "README.md"):
        (here / "set" / "data" / name).write_text("")
    _, sender, argv = call_inside("run", "set")
    assert sender.sent == [here / "set" / "data" / name for name in ("a.parquet", "b.jsonl")]
    assert argv[-2:] == ["/runs/.inputs/0/a.parquet", "/runs/.inputs/0/b.jsonl"]
    (here / "set" / "data" / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="kept for testing"):
        call_inside("run", "set")


def test_a_folder_without_chats_is_refused(here: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        call_inside("run", "run")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("run --nonsense --container", 2, "there is no option --nonsense"),
        ("nonsense --container", 2, "there is no verb 'nonsense'"),
        ("run --epochs x --container", 2, "epochs"),
        ("run --help --container", 0, "Usage: kolotune run"),
        ("container status --container", 2, "container start NAME"),
        ("models --container", 15, "Docker can't be reached"),
        ("container status", 15, "Docker can't be reached"),
        ("container stop", 15, "DOCKER_HOST"),
        ("container start -- -x", 15, "Docker"),
    ],
)
def test_without_docker(
    line: str, code: int, words: str, kolotune: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{here}/none.sock")
    found, output = kolotune(*line.split())
    assert (found, words in output, "Traceback" in output) == (code, True, False), output


def test_init_runs_on_this_machine(kolotune: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{here}/none.sock")
    assert kolotune("init", "new", "--container")[0] == 0
    assert (here / "new" / "chats.jsonl").is_file()
