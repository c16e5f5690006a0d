"""What the source does not contain, such as ways to run code from files. Read from the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Container, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kolotune", "bench", "examples", "tests")


@cache
def source(folder: str) -> dict[str, ast.Module]:
    """Return the parsed files of a folder, by path."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def name_of(node: ast.expr) -> str:
    """Return ``a.b.c`` of an expression that is a name; of others the part that is one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(*folders: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Return file, name of the called function, and call."""
    for folder in folders:
        for path, tree in source(folder).items():
            for name, call in calls_in(tree):
                yield path, name, call


@cache
def calls_in(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(name_of(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def matching(wrong: Callable[[str, ast.Call], bool], *folders: str, except_in: Container[str] = ()) -> list[str]:
    """Return where the calls are that are wrong."""
    found = [(path, name, call) for path, name, call in calls(*folders) if path not in except_in]
    return [f"{path}:{call.lineno}: {name}" for path, name, call in found if wrong(name, call)]


def test_there_is_something_to_find() -> None:
    assert len(source("kolotune")) > 100
    assert matching(lambda name, _: name == "subprocess.Popen", "kolotune")


def test_no_shell() -> None:
    shells = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn")
    assert not matching(lambda name, call: keyword(call, "shell") is not None or name in shells, *FOLDERS)


def test_processes_start_in_one_module() -> None:
    starts = ("os.fork", "os.posix_spawn", "asyncio.create_subprocess_exec")
    assert not matching(
        lambda name, _: name.startswith(("subprocess.", "os.exec", "os.spawn", "multiprocessing.")) or name in starts,
        "kolotune",
        except_in=("kolotune/runners/local.py",),
    )


def test_no_code_from_text() -> None:
    assert not matching(
        lambda name, _: name in ("eval", "exec", "compile", "__import__"), "kolotune", "bench", "examples"
    )


def test_yaml_is_read_by_safe_loaders_only() -> None:
    unsafe = ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all")
    assert not matching(lambda name, _: name in unsafe, *FOLDERS)
    assert len(matching(lambda name, _: name == "yaml.load", *FOLDERS)) == 1  # config.py's, with what follows
    for path, tree in source("kolotune").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any("Loader" in name_of(base) for base in node.bases):
                assert [name_of(base) for base in node.bases] == ["yaml.SafeLoader"], path


def test_pickles_are_our_own_processes_only() -> None:
    """Of a worker, or of a file that this process has written."""
    own = ("kolotune/runners/workers.py", "kolotune/chats/dataset/row_store.py")
    loads = ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open")
    assert not matching(lambda name, _: name in loads, "kolotune", "bench", "examples", except_in=own)
    for path, tree in source("kolotune").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"), path


def test_torch_loads_weights_only() -> None:
    assert not matching(
        lambda name, call: name == "torch.load" and not is_constant(keyword(call, "weights_only"), True), *FOLDERS
    )


def test_no_code_of_a_model_is_trusted() -> None:
    assert not matching(
        lambda _, call: (
            keyword(call, "trust_remote_code") is not None
            and not is_constant(keyword(call, "trust_remote_code"), False)
        ),
        *FOLDERS,
    )
    loaders = ("AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained")
    trusting = matching(
        lambda name, call: name in loaders and keyword(call, "trust_remote_code") is None,
        "kolotune",
    )
    assert not trusting


def test_archives_are_unpacked_by_filter() -> None:
    """`toolchain` sets the filter; `archive` checks each entry itself."""
    matches = matching(lambda name, _: name.endswith((".extractall", ".extract")), "kolotune")
    assert [each.split(":")[0] for each in matches] == ["kolotune/llamacpp/toolchain.py"]


def test_certificates_are_checked() -> None:
    assert not matching(lambda _, call: is_constant(keyword(call, "verify"), False), *FOLDERS)
    assert not matching(lambda name, _: name in ("ssl._create_unverified_context", "tempfile.mktemp"), *FOLDERS)


def test_untrusted_templates_run_in_one_module() -> None:
    runs = ("apply_chat_template", "render_jinja_template", "_compile_jinja_template")
    assert not matching(lambda name, _: name.rpartition(".")[2] in runs, "kolotune")
    matches = matching(
        lambda name, _: name.rpartition(".")[2] in ("from_string", "Template", "compile_expression"), "kolotune"
    )
    # The second runs in the first; the third is the report's own page.
    assert [each.split(":")[0] for each in matches] == [
        "kolotune/chats/templates/jinja.py",
        "kolotune/chats/templates/opaque_strings.py",
        "kolotune/report/page.py",
    ]


JSON_READERS = ("kolotune/foundation/typed_storage.py",)
# torchtune's environment has no kolotune, so its recipe reads JSON itself.
JSON_FOLDERS = ("kolotune/chats/reading/", "kolotune/engines/torchtune/inside/")


def test_json_is_read_in_one_module() -> None:
    """Everything else gets typed facts, or values that `typed_storage` has parsed."""
    reads = matching(lambda name, _: name in ("json.loads", "json.load", "json.JSONDecoder"), "kolotune")
    assert not [each for each in reads if not each.startswith((*JSON_FOLDERS, *JSON_READERS))]


# Beside the reporter: lines of JSON between our own processes, and what a container's terminal shows, cleaned.
PRINTING = (
    "kolotune/foundation/reporter/clean_text.py",
    "kolotune/foundation/reporter/json_lines.py",
    "kolotune/foundation/reporter/plain.py",
    "kolotune/engines/native/launcher.py",
    "kolotune/engines/torchtune/environment.py",
    "kolotune/engines/torchtune/inside/kolotune_recipe/events.py",
    "kolotune/launching/node.py",
    "kolotune/launching/node_task.py",
    "kolotune/llamacpp/log.py",
    "kolotune/runners/container/inside.py",
    "kolotune/runners/container/verb.py",
    "kolotune/runners/child_process.py",
    "kolotune/runners/watchdog.py",
)


def test_only_modules_that_clean_text_print() -> None:
    prints = ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "click.echo")
    assert not matching(lambda name, _: name in prints, "kolotune", except_in=PRINTING)


def test_modules_that_are_named_in_strings_exist() -> None:
    """Nothing else finds those that only a slow suite imports by name."""
    folders = "|".join(path.name for path in (ROOT / "kolotune").iterdir() if path.is_dir())
    named = re.compile(rf"kolotune\.(?:{folders})(?:\.\w+)*")
    strings = [
        (f"{path}:{node.lineno}", node.value)
        for folder in FOLDERS
        for path, tree in source(folder).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and named.fullmatch(node.value)
    ]
    assert len(strings) > 20
    assert not [f"{place}: {name}" for place, name in strings if not _exists(name)]


def _exists(name: str) -> bool:
    """Whether it is a module's name, or that of something in one."""
    *parents, last = name.split(".")
    path, parent = ROOT.joinpath(*parents, last), ROOT.joinpath(*parents)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    if not file.is_file():
        return _exists(".".join(parents))
    return re.search(rf"\b{last}\b", file.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("import json\njson.loads('{}')", test_json_is_read_in_one_module),
        ("import subprocess\nsubprocess.run('a', shell=True)", test_no_shell),
        ("import yaml\nyaml.unsafe_load('')", test_yaml_is_read_by_safe_loaders_only),
        ("import torch\ntorch.load('x')", test_torch_loads_weights_only),
        ("import torch\ntorch.load('x', weights_only=False)", test_torch_loads_weights_only),
        ("f(trust_remote_code=True)", test_no_code_of_a_model_is_trusted),
        ("f(trust_remote_code=x)", test_no_code_of_a_model_is_trusted),
        ("import pickle\npickle.loads(b'')", test_pickles_are_our_own_processes_only),
        ("from pickle import loads", test_pickles_are_our_own_processes_only),
        ("eval('1')", test_no_code_from_text),
        ("import os\nos.execv('a', [])", test_processes_start_in_one_module),
        ("tokenizer.apply_chat_template([])", test_untrusted_templates_run_in_one_module),
        ("print('a')", test_only_modules_that_clean_text_print),
        ("'kolotune.ollama.absent'", test_modules_that_are_named_in_strings_exist),
    ],
)
def test_each_of_these_tests_can_fail(text: str, test: Callable[[], None]) -> None:
    trees = source("kolotune")
    trees["kolotune/planted.py"] = ast.parse(text)
    try:
        with pytest.raises(AssertionError):
            test()
    finally:
        del trees["kolotune/planted.py"]
