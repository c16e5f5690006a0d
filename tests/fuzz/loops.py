"""Look for inputs that break a parser: by mutation alone, or guided by coverage."""

from __future__ import annotations

# ruff: noqa: E501
import faulthandler
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fuzz.seeds import seeds

SECONDS, MEGABYTES = 5, 1000
_WORDS = (
    b"\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"\xef\xbb\xbf", b'"', b'"""', b"{", b"}", b"[", b"]", b"\\u0000", b"\\ud800", b"\n",
    b"\r", b"NaN", b"1e999", b"-1", b"9" * 500, b"[" * 2000, b'{"a":' * 2000, b"../", b"&a [*a, *a]", b"!!python/object:os.system ",
    b"\x1b[2J", b"\xe2\x80\xae", b"GGUF", b"PAR1", b'"shape": [-1]', b'"data_offsets": [0, 18446744073709551615]', b"FROM ",
)  # fmt: skip


def inputs(name: str, seed: int) -> Iterator[bytes]:
    """Yield endless inputs, the same for a seed: a parser's good inputs with one to eight changes."""
    dice = random.Random(f"{name} {seed}")
    good = seeds()[name]
    yield from good
    while True:
        data = bytearray(dice.choice(good))
        for _ in range(dice.randint(1, 8)):
            at, length = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 4, 8, 40))
            kind = dice.randrange(7)
            if kind == 0:
                data[at : at + 1] = bytes([dice.randrange(256)])
            elif kind == 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << dice.randrange(8)]) if at < len(data) else b""
            elif kind == 2:
                del data[at : at + length]
            elif kind == 3:
                data[at:at] = dice.choice(_WORDS)
            elif kind == 4:
                data[at : at + length] = dice.choice(_WORDS)
            elif kind == 5:
                data[at:at] = data[at : at + length]
            else:
                second = dice.choice(good)
                data[at:] = second[dice.randrange(len(second)) :]
        yield bytes(data)


def try_inputs(name: str, seed: int, seconds: float) -> tuple[int, float]:
    """Run a parser for some seconds of processor time.

    Returns:
        The number of inputs, and the seconds of processor time that the slowest took.
    """
    from fuzz.targets import run  # not earlier: `guided` instruments what is imported

    slowest, end = 0.0, float("inf")
    for count, data in enumerate(inputs(name, seed)):
        if count == len(seeds()[name]):  # the first ones include the loading of libraries
            slowest, end = 0.0, time.process_time() + seconds
        clock = time.process_time()
        try:
            run(name, data)
        except BaseException:
            sys.stderr.write(f"{name}: {data[:2000]!r}\n")
            raise
        slowest = max(slowest, time.process_time() - clock)
        if time.process_time() > end:
            return count, slowest
    raise AssertionError  # the inputs never end


def mutated(name: str, seconds: float, findings: str) -> None:
    """Run a parser with mutated inputs, with a new seed each time."""
    limit = MEGABYTES << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    faulthandler.dump_traceback_later(seconds + 60, exit=True)
    count, slowest = try_inputs(name, random.SystemRandom().randrange(1 << 30), seconds)
    print(f"{name}: {count} inputs, the slowest {slowest:.2f} s", flush=True)
    assert slowest < SECONDS
    del findings


def guided(name: str, seconds: float, findings: str) -> None:
    """Run a parser with inputs that are guided by coverage."""
    import atheris

    with atheris.instrument_imports(include=["kolotune"]):
        from fuzz import targets
    corpus = Path(findings, "corpus", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={int(seconds)}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-verbosity=0"]
    options.append("-print_final_stats=1")  # with the number of inputs, which `__main__` reads
    atheris.Setup(
        [name, *options, f"-artifact_prefix={findings}/{name}-", str(corpus)], lambda data: targets.run(name, data)
    )
    atheris.Fuzz()
