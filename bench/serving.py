"""Tokens per second of `kolotune serve`, with one client and with four, beside llama.cpp's server alone.

    python bench/serving.py [--rounds N] [--llama-cpp FOLDER] [--earlier PYTHON] [--earlier-avx2 PYTHON]
                            [--json FILE] [--quick]

All serve SmolLM2 as Q4_K_M. Each client asks one question after another over OpenAI's API, streamed, for answers of at
most 64 tokens, five in all from one client and eight from four; the tokens of all answers are divided by the time until
the last one, prompts included. The programs take turns. With --earlier, the Python of an environment that has an
earlier kolotune, that one's `serve` takes part. Its llama.cpp is compiled for the machine that compiles it, today's for
AVX2; with --earlier-avx2, an environment whose llama.cpp is compiled for AVX2 too, that one takes part as well. With
--llama-cpp, today's `serve` takes part once more, with that folder's `llama-server`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import material
import openai
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions

CLIENTS = (1, 4)
PARALLEL = 4
CONTEXT = 4096
LONGEST = 64
OURS, ALONE = "kolotune serve", "llama.cpp's server"
OWN = "kolotune serve, another llama-server"
EARLIER, EARLIER_AVX2 = "an earlier kolotune serve", "an earlier kolotune serve, AVX2 only"


@contextlib.contextmanager
def started(argv: list[str]) -> Iterator[openai.OpenAI]:
    """Start a program that prints a line of JSON with its url; yield a client of it."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ | material.OFFLINE) as child:
        assert child.stdout is not None
        try:
            url = next(event["url"] for event in map(json.loads, child.stdout) if "url" in event)
            http = httpx.Client(trust_env=False, timeout=600)
            yield openai.OpenAI(base_url=url, api_key="none", http_client=http)
        finally:
            child.terminate()


def serve_alone(gguf: str) -> None:
    """Serve a file by llama.cpp's server, without kolotune, until this process is ended."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_parallel, parameters.n_ctx = PARALLEL, PARALLEL * CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(material.THREADS)
    parameters.fit_params, parameters.verbosity, parameters.ui, parameters.warmup = False, 1, False, False
    server = xllamacpp.Server(parameters)
    print(json.dumps({"url": f"{server.listening_address}/v1"}), flush=True)
    time.sleep(1e6)


def answer(client: openai.OpenAI, question: str) -> int:
    """Return the number of tokens of a streamed answer."""
    stream = client.chat.completions.create(
        model="run",
        messages=[{"role": "user", "content": question}],
        max_tokens=LONGEST,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    return sum(chunk.usage.completion_tokens for chunk in stream if chunk.usage)


def rate(client: openai.OpenAI, clients: int) -> float:
    """Return the tokens per second of all clients together."""
    texts = [f"Write a few sentences about the number {number}." for number in range(max(CLIENTS) + clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(lambda text: answer(client, text), texts))
    return tokens / (time.perf_counter() - began)


def compare(rates: Mapping[tuple[str, int], list[float]], result: Result) -> None:
    """Add the targets to a result: medians of the rounds' ratios."""
    for count, target in zip(CLIENTS, (1.7, 2.7), strict=True):
        for ours in (OURS, OWN):
            for theirs, wanted in {ALONE: 0.95, EARLIER: target, EARLIER_AVX2: target}.items():
                if (ours, count) in rates and (theirs, count) in rates:
                    pairs = zip(rates[ours, count], rates[theirs, count], strict=True)
                    ratio = median(one / other for one, other in pairs)
                    result.at_least(f"{count} clients, {ours}, relative to {theirs}", ratio, wanted)


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="a LLAMA_CPP_DIR with a llama-server")
    parser.add_argument("--earlier", type=Path, metavar="PYTHON", help="of an environment with an earlier kolotune")
    parser.add_argument("--earlier-avx2", type=Path, metavar="PYTHON", help="the same with llama.cpp for AVX2 only")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        serve_alone(arguments.alone)
    rounds = 2 if arguments.quick else arguments.rounds
    result = Result("serving", "Serving", versions("xllamacpp", "openai", "uvicorn"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:

        def made(program: tuple[str, ...], *more: str) -> Path:
            """Return a run folder of its own."""
            run = Path(tempfile.mkdtemp(dir=name), "run")
            argv = [*program, "export", material.base(), "--output-dir", run, "--quantization", "Q4_K_M", *more]
            measure(argv, Path(name, "log"), env=material.OFFLINE)
            return run

        run = made(KOLOTUNE, "--no-compare")
        programs = {
            OURS: [*KOLOTUNE, "serve", str(run), "--port=0", f"--parallel={PARALLEL}", "--json"],
            ALONE: [sys.executable, __file__, "--alone", str(run / "MergedQ4_K_M.gguf")],
        }
        if arguments.llama_cpp:
            programs[OWN] = ["env", f"LLAMA_CPP_DIR={arguments.llama_cpp.absolute()}", *programs[OURS]]
        others = {EARLIER: arguments.earlier, EARLIER_AVX2: arguments.earlier_avx2}
        for program, python in others.items():
            if python:
                earlier = (str(python), "-P", "-m", "kolotune")
                programs[program] = [*earlier, "serve", str(made(earlier)), "--port=0", "--json"]
        apis = {program: running.enter_context(started(argv)) for program, argv in programs.items()}
        rates: dict[tuple[str, int], list[float]] = {(program, count): [] for count in CLIENTS for program in apis}
        for program in apis:
            answer(apis[program], "Hello!")  # the first answer finds the file in no cache
        for _ in range(rounds):
            for program, count in rates:
                rates[program, count].append(rate(apis[program], count))
                print(f"{program}, {count} clients: {rates[program, count][-1]:.1f} tokens/s", flush=True)
    rows = [[program, count, median(seen), min(seen), max(seen)] for (program, count), seen in rates.items()]
    result.tables.append(Table(f"{rounds} rounds", ["", "clients", "tokens/s", "slowest", "fastest"], rows))
    compare(rates, result)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
