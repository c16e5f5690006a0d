"""A base model that is sharded over two processes: the memory of each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.runs import losses
from support.training import TrainingFolder, random_chats, write_tokens

from kolotune.engines.job import TrainJob
from kolotune.engines.memory import BatchShape
from kolotune.engines.native.memory import transformers_training
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.weights.model_shape import AdapterShape, read_shape

EMBEDDING = 128256 * 2048 * 2


def peaks(argv: list[str]) -> list[int]:
    """Run a program; return the peak of private memory of it and each descendant, in bytes, largest first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    peak: dict[int, int] = {}
    while child.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            for each in (child.pid, *(process.pid for process in psutil.Process(child.pid).children(recursive=True))):
                lines = Path(f"/proc/{each}/status").read_text(encoding="ascii").splitlines()
                own = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
                peak[each] = max(peak.get(each, 0), own << 10)
        time.sleep(0.02)
    assert child.returncode == 0
    return sorted(peak.values(), reverse=True)


def engine(job: TrainJob) -> list[int]:
    file = Path(job.metrics).parent / "job.json"
    job.write(file)
    return peaks([sys.executable, "-m", "kolotune.engines.native", str(file)])


def planned_bytes(job: TrainJob) -> int:
    """Return the bytes of each process that `kolotune plan` estimates."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    longest = max(tokens.chat_length(index) for index in range(len(tokens)))
    shape = read_shape(Path(job.base_model))
    batch = BatchShape(longest * job.batch_size, job.batch_size, longest, 0, longest * job.batch_size, padded=False)
    adapter = AdapterShape.of(shape, job.lora_rank, job.target_modules)
    gathered = max(linear.weight_count for linear in shape.linears)
    return transformers_training(shape, adapter, batch, 2, recompute=True, shards=job.nproc, gathered=gathered).own


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_each_process_holds_little_more_than_half_of_a_1b(llama3_1b_base: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "data" / "train.safetensors", random_chats(8, 1, 40, 60))
    training = TrainingFolder(tmp_path)
    options = {
        "base_model": str(llama3_1b_base), "dtype": "bf16", "epochs": 1, "batch_size": 2, "gradient_accumulation": 2,
    }  # fmt: skip
    jobs = [training.job("alone", **options), training.job("sharded", nproc=2, sharded=True, **options)]
    idle = peaks([sys.executable, "-c", "import torch, time; time.sleep(1)"])[0]
    alone = engine(jobs[0])[0] - idle
    sharded = [peak - idle for peak in engine(jobs[1])[:2]]
    print(f"alone {alone / 1e6:.0f} MB, sharded {[round(peak / 1e6) for peak in sharded]} MB, idle {idle / 1e6:.0f} MB")
    assert max(sharded) <= 0.6 * alone + EMBEDDING
    assert min(sharded) > 0.3 * alone, "both hold a shard"
    planned = planned_bytes(jobs[1]) - idle
    print(f"the plan's formula says {planned / 1e6:.0f} MB")
    assert planned == pytest.approx(max(sharded), rel=0.25)
    curves = [losses(Path(job.metrics)) for job in jobs]
    assert curves[0] == pytest.approx(curves[1], rel=0.01), "bf16, computed in two ways"
