"""What quantized files keep of a finished run: ggml without and with an importance matrix, and compensated.

    python bench/quantization.py RUN PROSE [--quantizations Q4_K_M,Q3_K_M,Q5_K_M,IQ4_XS] [--seed N] [--chats N]

Three texts, none of which the files are calibrated on: the answers of the run's held-out chats, 60 chats made of
docstrings, and some 20 kB of prose in the file PROSE. For each the mean KL divergence from the unquantized GGUF with
its standard error over the chats (of prose: over pieces of 256 tokens), and for the held-out chats the share of
training's gain that is kept. The matrix is computed from the text that the compensated files are calibrated with. The
evaluator's own noise is that of the first plain file, read token by token and in batches. `model_variants.py` makes
other models for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from kolotune.foundation import config as configs
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.foundation.quantization_types import canonical_name
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import conversion_source, convert, matrix_computation, quantize
from kolotune.gguf.budgets import BudgetQuantizer, choice_basis
from kolotune.gguf.run_compensation import Compensation
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.pipeline.context import open_context
from kolotune.run_folder.layout import HELD_OUT_TOKENS, RunFolder
from kolotune.run_folder.stage import Context

Piece = tuple[list[int], list[int]]
"""Tokens, and the positions at which predictions are compared."""
PIECE = 256


@dataclass(frozen=True)
class Measured:
    """Mean KL in nats with its standard error, and the sum of the losses and the number of tokens of each piece."""

    kl: float
    error: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return sum(self.losses) / sum(self.tokens)


def held_out(run: RunFolder) -> list[Piece]:
    """Return the held-out chats, compared where the loss counts the next token."""
    with safe_open(run.prepared / HELD_OUT_TOKENS, framework="numpy") as file:
        ids, labelled, offsets = (file.get_tensor(name) for name in ("ids", "labelled", "offsets"))
    pieces = []
    for start, end in itertools.pairwise(offsets):
        counted = labelled[start:end].astype(bool)
        pieces.append((ids[start:end].tolist(), [at for at in range(end - start - 1) if counted[at + 1]]))
    return pieces


def docstring_chats(run: RunFolder, count: int, seed: int) -> list[Piece]:
    """Return chats made of docstrings, compared at the answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer, local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "chats.jsonl")
        script = Path(__file__).with_name("docstring_chats.py")
        subprocess.run([sys.executable, str(script), str(file), str(count), "--seed", str(seed)], check=True)
        chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    pieces = []
    for turns in chats:
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        whole = prompt + tokenizer(turns[-1]["content"], add_special_tokens=False)["input_ids"]
        pieces.append((whole, list(range(len(prompt) - 1, len(whole) - 1))))
    return pieces


def prose(run: RunFolder, file: Path) -> list[Piece]:
    """Return pieces of a text, compared at every token but the first ones, which have too little before them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    ids = tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids
    starts = range(0, len(ids) - PIECE + 1, PIECE)
    return [(ids[start : start + PIECE], list(range(32, PIECE - 1))) for start in starts]


def predictions(gguf: Path, pieces: list[Piece]) -> Iterator[np.ndarray]:
    """Yield the log-probabilities of each piece."""
    model = ExactGguf(gguf, max(len(ids) for ids, _ in pieces) + 1)
    try:
        for ids, positions in pieces:
            yield model.log_probabilities(ids, positions)
    finally:
        model.close()


def written(gguf: Path, pieces: list[Piece], folder: Path) -> list[Path]:
    """Write the log-probabilities of each piece to a file."""
    folder.mkdir()
    files = []
    for number, array in enumerate(predictions(gguf, pieces)):
        files.append(folder / f"{number}.npy")
        np.save(files[-1], array)
    return files


def measured(reference: list[Path], gguf: Path, pieces: list[Piece]) -> Measured:
    """Compare a file with what `written` wrote of the unquantized one."""
    sums, lengths, losses = [], [], []
    for before, after, (ids, positions) in zip(reference, predictions(gguf, pieces), pieces, strict=True):
        wide = np.load(before).astype(np.float64)
        sums.append(float((np.exp(wide) * (wide - after)).sum()))
        lengths.append(len(positions))
        losses.append(-float(after[np.arange(len(positions)), [ids[at + 1] for at in positions]].sum()))
    total, count = sum(lengths), len(sums)
    mean = sum(sums) / total
    residuals = sum((each - mean * length) ** 2 for each, length in zip(sums, lengths, strict=True))
    return Measured(mean, (residuals * count / (count - 1)) ** 0.5 / total, tuple(losses), tuple(lengths))


def gain_kept(base: Measured, tuned: Measured, file: Measured) -> tuple[float, float]:
    """Return the share of training's gain that a file keeps, and its standard error over the chats."""
    gains = [before - after for before, after in zip(base.losses, tuned.losses, strict=True)]
    kept = [before - after for before, after in zip(base.losses, file.losses, strict=True)]
    share, count = sum(kept) / sum(gains), len(gains)
    residuals = sum((each - share * gain) ** 2 for each, gain in zip(kept, gains, strict=True))
    return share, (residuals * count / (count - 1)) ** 0.5 / sum(gains)


def noise(gguf: Path, pieces: list[Piece]) -> float:
    """Return the mean KL between the same file read in batches and token by token."""
    from kolotune.llamacpp import evaluation

    together = list(predictions(gguf, pieces))
    before, evaluation.BATCH = evaluation.BATCH, 1
    try:
        apart = list(predictions(gguf, pieces))
    finally:
        evaluation.BATCH = before
    pairs = zip(together, apart, strict=True)
    return float(np.concatenate([(np.exp(a.astype(np.float64)) * (a - b)).sum(axis=1) for a, b in pairs]).mean())


def made(
    context: Context, name: str, way: str, matrix: Path, compensation: Compensation, folder: Path
) -> tuple[Path, float]:
    """Quantize the run's GGUF in one of three ways; return the file and the seconds."""
    target, log, say = folder / f"{name}-{way}.gguf", folder / "log", PlainReporter()
    started, source = time.perf_counter(), context.run.gguf
    imatrix, compensates = matrix if way == "matrix" else None, compensation if way == "compensated" else None
    if read_budget(name) is None:
        quantize.quantize_file(source, target, name, log, say, imatrix, compensation=compensates)
    else:
        basis, kept = choice_basis(context, compensation.tensors), folder / f"sensitivity-{way}"
        chosen = BudgetQuantizer(source, kept, basis, log, say, imatrix, compensates).make(name, target)
        print(f"{name} {way}: predicted KL {chosen.predicted_kl:.4f}", file=sys.stderr)
    return target, time.perf_counter() - started


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("prose", type=Path)
    parser.add_argument("--quantizations", default="Q4_K_M,Q3_K_M,Q5_K_M,IQ4_XS")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--chats", type=int, default=60, help="made of docstrings")
    options = parser.parse_args()
    run = RunFolder(options.run.absolute())
    saved = configs.resolve((configs.load_file(run.config), str(run.config), run.root))
    context = open_context(run, dataclasses.replace(saved, quantizer="compensated"))
    texts = {
        "held-out chats": held_out(run),
        "docstring chats": docstring_chats(run, options.chats, options.seed),
        "prose": prose(run, options.prose),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        compensation = conversion_source.find_compensation(context, folder / "log", PlainReporter())
        assert compensation is not None
        rows = compensation.rows
        offsets = np.arange(0, len(rows) * len(rows[0]) + 1, len(rows[0]), dtype=np.int64)
        save_file({"ids": np.array(rows, np.int32).reshape(-1), "offsets": offsets}, folder / "tokens.safetensors")
        matrix_computation.compute(run.gguf, folder / "tokens.safetensors", folder / "matrix.gguf")
        references = {text: written(run.gguf, pieces, folder / text) for text, pieces in texts.items()}
        chats, answers = "held-out chats", texts["held-out chats"]
        convert.convert_folder(context.base, folder / "base.gguf", folder / "log", PlainReporter(), exact=False)
        base, tuned = (measured(references[chats], gguf, answers) for gguf in (folder / "base.gguf", run.gguf))
        print(f"loss of the base {base.loss:.4f}, of the unquantized GGUF {tuned.loss:.4f}", flush=True)
        print(
            "| quantization | rounded by | bytes | s |"
            + "".join(f" KL, {text} |" for text in texts)
            + " loss | gain kept |"
        )
        print("|---|---|---|---|" + "---|" * len(texts) + "---|---|", flush=True)
        for number, name in enumerate(map(canonical_name, options.quantizations.split(","))):
            for way in ("plain", "matrix", "compensated"):
                gguf, seconds = made(context, name, way, folder / "matrix.gguf", compensation, folder)
                found = [measured(references[text], gguf, pieces) for text, pieces in texts.items()]
                cells = "".join(f" {each.kl:.4f} ± {each.error:.4f} |" for each in found)
                size, (kept, error) = gguf.stat().st_size, gain_kept(base, tuned, found[0])
                cells += f" {found[0].loss:.4f} | {kept:.1%} ± {error:.1%} |"
                print(f"| {name} | {way} | {size} | {seconds:.0f} |{cells}", flush=True)
                if not number and way == "plain":
                    print(f"noise of the evaluator: KL {noise(gguf, answers):.4f}", file=sys.stderr)
                gguf.unlink()


if __name__ == "__main__":
    main()
