"""A Modelfile says what was meant, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile, read_commands
from kolotune.ollama.modelfile_writer import render_modelfile
from kolotune.ollama.parameters import IGNORED, KNOWN, validate

# Mostly texts that the parser treats specially, combined at random.
PIECES = [
    *('"', '""', '"""', "\n", "\r", "\r\n", " ", "\t", "#", "\\", "{{ .System }}", "SYSTEM ", "FROM x", "a", "é", "🙂"),
    *("\nADAPTER /etc/shadow\n", "\nPARAMETER stop x"),
    *("\u200d", "\u00a0", "\x00", "\x1b", "\ufeff", "\u2028"),
]
HARD = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
TEXTS = HARD | st.text(max_size=30)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
PARAMETERS = st.one_of(
    st.tuples(st.just("stop"), HARD.filter(bool)),
    st.tuples(st.sampled_from(["temperature", "top_p"]), FLOATS),
    st.tuples(st.sampled_from(["num_ctx", "seed"]), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("use_mmap"), st.booleans()),
)
MODELFILES = st.builds(
    Modelfile,
    from_=st.sampled_from(["./Merged.gguf", "./a b/c.gguf", "./ü.gguf"]),
    template=st.none() | HARD,
    system=st.none() | TEXTS,
    license=st.none() | HARD,
    parameters=st.lists(
        PARAMETERS, max_size=4, unique_by=lambda pair: pair[0] + str(pair[1]) * (pair[0] == "stop")
    ).map(tuple),
    comments=st.lists(st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]) | st.just(" ")), max_size=2).map(
        tuple
    ),
)


def check_round_trip(count: int) -> dict[str, int]:
    """Check that any text is carried exactly or refused; return how often each happened."""
    seen = {"carried": 0, "refused": 0}

    @settings(max_examples=count, deadline=None, database=None)
    @given(MODELFILES)
    def check(modelfile: Modelfile) -> None:
        try:
            text = render_modelfile(modelfile)
        except ConfigError as error:
            assert error.hint
            seen["refused"] += 1
            return
        assert parse_modelfile(text) == modelfile
        # As it passes through a file on any system.
        assert parse_modelfile(text.encode().decode()) == modelfile
        allowed = {"model", "template", "system", "license"} | set(KNOWN)
        assert {command.name for command in read_commands(text)} <= allowed
        seen["carried"] += 1

    check()
    return seen


@pytest.mark.parametrize("count", [3000])
def test_round_trip(count: int) -> None:
    seen = check_round_trip(count)
    assert min(seen.values()) > count / 20


def test_the_format() -> None:
    modelfile = Modelfile(
        from_="./MergedQ4_K_M.gguf",
        template='{{ "x\\n" }}',
        system='You say\n"Arrr".',
        parameters=(
            ("stop", "<|im_end|>"),
            ("stop", 'a"\nb'),
            ("temperature", 0.7),
            ("num_ctx", 4096),
            ("use_mmap", True),
        ),
        license="MIT",
        comments=("Made by kolotune.",),
    )
    assert render_modelfile(modelfile) == (
        "# Made by kolotune.\n"
        "FROM ./MergedQ4_K_M.gguf\n"
        'TEMPLATE """{{ "x\\n" }}"""\n'
        'SYSTEM """You say\n"Arrr"."""\n'
        'LICENSE """MIT"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop """a"\nb"""\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER num_ctx 4096\n"
        "PARAMETER use_mmap true\n"
    )


@pytest.mark.parametrize(
    "system",
    [
        'x"""\nADAPTER /etc/shadow',
        'x"""\r\nADAPTER /etc/shadow',
        'x""" \t\nFROM /etc/shadow\nSYSTEM """',
        '"""\nMESSAGE user "hi"',
        'x"""\n# rest"""',
    ],
)
@pytest.mark.parametrize("field", ["system", "template", "license"])
def test_injection_is_refused(field: str, system: str) -> None:
    fields: dict[str, Any] = {field: system}
    with pytest.raises(ConfigError, match="instructions to Ollama") as error:
        render_modelfile(Modelfile("./m.gguf", **fields))
    assert field in error.value.cause
    assert "JSON API" in error.value.hint


@pytest.mark.parametrize(
    "system",
    [
        'x"""', '"', '""""', 'say """ twice """ here', '"""\n', "", "\n", " x ", "#\n# no comment\n", "a\r\nb\tc",
        '"x"', "PARAMETER\n",
    ],
)  # fmt: skip
def test_odd_texts_are_carried_or_refused(system: str) -> None:
    modelfile = Modelfile("./m.gguf", system=system, parameters=(("stop", system or "x"),))
    if '"""\n' in system:
        with pytest.raises(ConfigError):
            render_modelfile(modelfile)
    else:
        assert parse_modelfile(render_modelfile(modelfile)) == modelfile


@pytest.mark.parametrize("character", ["\u200d", "\u00a0", "\u3000", "\x1b", "\x00", "\u2028", "\ud800"])
def test_dropped_characters_are_refused(character: str) -> None:
    assert parse_modelfile(f'FROM x\nSYSTEM "a{character}b"').system == "ab"
    with pytest.raises(ConfigError, match=f"U\\+{ord(character):04X} .character 2 of system"):
        render_modelfile(Modelfile("./m.gguf", system=f"a{character}b"))


@pytest.mark.parametrize(
    "path",
    [
        "Merged.gguf", "/m.gguf", "./../m.gguf", "./", "./a//b", ".\\m", "./m.gguf ", "./a\nADAPTER x", "./a\\b",
        "~/x", "",
    ],
)  # fmt: skip
def test_paths_are_checked(path: str) -> None:
    with pytest.raises(ConfigError, match="FROM"):
        render_modelfile(Modelfile(path))


def test_comments_are_one_line() -> None:
    with pytest.raises(ConfigError, match="one line"):
        render_modelfile(Modelfile("./m.gguf", comments=("a\nADAPTER x",)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from x", Modelfile("x")),
        ("\ufeff# hi\n#  there\n\n  FrOm  a b \t\n", Modelfile("a b", comments=("hi", " there"))),
        ("FROM x # no comment", Modelfile("x # no comment")),
        ('FROM x\nSYSTEM "two\nlines"', Modelfile("x", system="two\nlines")),
        ('FROM x\nSYSTEM """a"""\nSYSTEM b', Modelfile("x", system="b")),
        ('FROM x\nSYSTEM """ a "" \n b"""  \nTEMPLATE c', Modelfile("x", system=' a "" \n b', template="c")),
        ("FROM x\r\nSYSTEM a\r\n", Modelfile("x", system="a")),
        ("FROM x\nSYSTEM \n", Modelfile("x", system="")),
        ('FROM x\nSYSTEM say "hi"', Modelfile("x", system='say "hi"')),
        ('FROM x\nPARAMETER stop a\nPARAMETER stop "b c"', Modelfile("x", parameters=(("stop", "a"), ("stop", "b c")))),
        (
            "FROM x\nPARAMETER use_mmap F\nPARAMETER top_p .5",
            Modelfile("x", parameters=(("use_mmap", False), ("top_p", 0.5))),
        ),
        ("FROM x\nPARAMETER mirostat 2", Modelfile("x")),
    ],
)
def test_parses_as_ollama_does(text: str, wanted: Modelfile) -> None:
    assert parse_modelfile(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only\n",
        "SYSTEM a",
        "FROM",
        "FROM\nx",
        "FROM x\nFOO y",
        "FROM x\nSYSTEM",
        'FROM x\nSYSTEM """a',
        'FROM x\nSYSTEM """a""',
        'FROM x\nSYSTEM "',
        "FROM x\nPARAMETER nonsense 1",
        "FROM x\nPARAMETER Temperature 1",
        "FROM x\nPARAMETER  stop a",
        "FROM x\nPARAMETER num_ctx 1.5",
        "FROM x\nPARAMETER num_ctx 1_000",
        "FROM x\nPARAMETER temperature warm",
        "FROM x\nPARAMETER use_mmap yes",
        "FROM x\nPARAMETER stop\n",
        "FROM x\nMESSAGE tool hi",
        "FROM x\nMESSAGE user hi",
        "FROM x\nADAPTER ./a",
        "FROM x\nFROM y",
        "FROM x\nLICENSE a\nLICENSE b",
        "FROM x\n1 y",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ArtifactError, match="Modelfile: "):
        parse_modelfile(text)


def test_all_commands_are_read() -> None:
    text = 'FROM x\nMESSAGE user "hi\nyou"\nMESSAGE assistant yes\nREQUIRES 0.14\nADAPTER ./a\nparameter seed 1'
    got = [(command.name, command.args) for command in read_commands(text)]
    assert got == [
        ("model", "x"),
        ("message", "user: hi\nyou"),
        ("message", "assistant: yes"),
        ("requires", "0.14"),
        ("adapter", "./a"),
        ("seed", "1"),
    ]


def test_parameters_are_typed() -> None:
    given_values = {
        "temperature": "0.7",
        "num_ctx": 4096,
        "stop": ["a", "b"],
        "use_mmap": "false",
        "top_p": 1,
        "seed": "-1",
    }
    assert validate(given_values) == (
        ("temperature", 0.7),
        ("num_ctx", 4096),
        ("stop", "a"),
        ("stop", "b"),
        ("use_mmap", False),
        ("top_p", 1.0),
        ("seed", -1),
    )


def test_all_wrong_parameters_are_reported_at_once() -> None:
    pairs: list[tuple[str, object]] = [
        ("temprature", 1),
        ("foo", 1),
        ("mirostat", 1),
        ("num_ctx", 1.5),
        ("num_ctx", True),
        ("temperature", "nan"),
        ("temperature", float("inf")),
        ("top_p", 1e39),
        ("use_mmap", 1),
        ("stop", 3),
        ("stop", ""),
        ("seed", 2**63),
        ("top_k", 1),
        ("top_k", 2),
    ]
    with pytest.raises(ConfigError) as error:
        validate(pairs)
    problems = error.value.cause.split(": ", 1)[1].split("; ")
    assert len(problems) == 13
    assert problems[0] == "temprature is unknown (did you mean temperature?)"
    assert "mirostat is ignored by Ollama" in problems
    assert problems[-1] == "top_k is set twice"


def test_no_known_parameter_is_ignored() -> None:
    assert not IGNORED & set(KNOWN)
