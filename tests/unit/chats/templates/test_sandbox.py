"""Templates that are bombs: each fails in time with one line, and only the child that ran it is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kolotune.chats.templates import sandbox
from kolotune.chats.templates.template import ChatTemplate
from kolotune.foundation.errors import TemplateError
from kolotune.runners import limits, workers

SHORT, LONG = "Hi", "Hi " * 1000
# The child of this module's tests has the real one's limits, but for the time: nobody waits for all of these.
CHILD = (
    "from kolotune.runners import limits; limits.SECONDS = 0.3; limits._GRACE_SECONDS = 0.2;"
    "from kolotune.chats.templates import sandbox; sandbox._main()"
)
TIME, MEMORY = "s of processor time", f"{limits.BYTES >> 20} MB of memory"
TOO_MUCH_TEXT = "writes far more text than it is given"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS: dict[str, tuple[str, str]] = {
    "a power": ("{{ 10 ** (10 ** 9 * messages | length) }}", TIME),
    "loops": (NESTED, TIME),
    "a long word": ("{{ 'a' * 10 ** 10 }}", MEMORY),
    "a long list": ("{{ ([1] * 10 ** 9) | length }}", MEMORY),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "it takes more than",
    ),
    "a wide number": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "a wide field": ("{{ '{:2000000000}'.format(1) }}", MEMORY),
    "centred": ("{{ 'a' | center(2000000000) }}", MEMORY),
    "replaced": ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", MEMORY),
    "much text": ("{{ 'a' * (100000000 * messages | length) }}", TOO_MUCH_TEXT),
    "a macro in itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "a loop in itself": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
}


@pytest.fixture(scope="module", autouse=True)
def child() -> Iterator[None]:
    """Replace this process's child by one with less time."""
    own, sandbox.shared = sandbox.shared, sandbox.Sandbox([sys.executable, "-P", "-c", CHILD])
    yield
    sandbox.shared.close()
    sandbox.shared = own


def turns(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_that_goes_off_for_long_chats_only(name: str) -> None:
    bomb, words = BOMBS[name]
    template = ChatTemplate(
        "{{ messages[0].content }}{% if messages[0].content | length > 999 %}" + bomb + "{% endif %}", {}
    )
    assert template.render(turns(SHORT)) == SHORT
    with pytest.raises(TemplateError) as error:
        template.render(turns(LONG))
    assert words in error.value.cause
    assert "\n" not in error.value.cause
    assert template.render(turns(SHORT)) == SHORT


@pytest.mark.parametrize(
    ("bomb", "words"), [("{{ 10 ** (10 ** 9) }}", TIME), (BOMBS["a long word"][0], MEMORY), (NESTED, TIME)]
)
def test_a_bomb_that_goes_off_before_any_chat(bomb: str, words: str) -> None:
    """Jinja computes constants when it parses a template."""
    with pytest.raises(TemplateError) as error:
        ChatTemplate(bomb, {}).render(turns(SHORT))
    assert words in error.value.cause


@pytest.mark.parametrize("text", ["{{ " + "(" * 100_000, "{% if a %}" * 20_000, "{{ " + "-" * 50_000 + "1 }}"])
def test_nesting_that_no_parser_follows(text: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(text, {}).render(turns(SHORT))
    assert ChatTemplate("{{ messages[0].content }}", {}).render(turns(SHORT)) == SHORT


def test_a_template_of_megabytes_is_not_read() -> None:
    with pytest.raises(TemplateError, match="longer than"):
        ChatTemplate("a" * 2_000_000, {})


@pytest.mark.parametrize(
    "way_out",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ messages[0].content.__reduce__() }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.name }}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_no_way_out_of_the_sandbox(way_out: str) -> None:
    try:
        text = ChatTemplate(way_out, {}).render(turns(SHORT))
    except TemplateError:
        return
    assert text == ""  # Jinja's way to say that there is no such thing


def test_the_child_can_open_nothing_and_start_nothing() -> None:
    """Check a process that gave up its files as the child does."""
    import subprocess

    tries = (
        "from kolotune.chats.templates import sandbox\nimport os\nsandbox._give_up_files()\n"
        "for do in (lambda: open('/etc/passwd'), lambda: open('made', 'w'), lambda: os.pipe()):\n"
        "    try: do()\n    except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", tries], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["24"] * 3  # EMFILE


def test_many_templates_and_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> bool:
        template = ChatTemplate(str(number % 70) + "{{ messages[0].content }}", {})
        return template.render(turns("é🎉\ud800"[: number % 4])) == str(number % 70) + "é🎉\ud800"[: number % 4]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, range(200)))


def _rendered(task: tuple[ChatTemplate, str]) -> str:
    limits.SECONDS, limits._GRACE_SECONDS = 1.0, 0.2
    try:
        return task[0].render(turns(task[1]))
    except TemplateError as error:
        return error.cause


def _rendered_deaf(task: tuple[ChatTemplate, str]) -> str:
    """As where Python is busy with one long step, and never comes to see the first limit's signal."""
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    return _rendered(task)


def test_workers_keep_the_same_limits() -> None:
    def tasks(name: str) -> list[tuple[ChatTemplate, str]]:
        template = ChatTemplate("{% if messages[0].content | length > 999 %}" + BOMBS[name][0] + "{% endif %}a", {})
        return [(template, SHORT), (template, LONG), (template, SHORT)]

    names = ["loops", "a long word", "much text"]
    with workers.pool(2) as pool:
        causes = list(pool.map(_rendered, [task for name in names for task in tasks(name)]))
    assert causes[::3] == causes[2::3] == ["a", "a", "a"]
    assert all(BOMBS[name][1] in cause for name, cause in zip(names, causes[1::3], strict=True))
    with pytest.raises(TemplateError, match=TIME), workers.pool(2) as pool:
        list(pool.map(_rendered_deaf, tasks("loops")))
