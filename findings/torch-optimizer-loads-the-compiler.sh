#!/usr/bin/env bash
# torch 2.13.0: the first optimizer of torch.optim that a process makes loads TorchDynamo, SymPy and distributed tensors.
#
# A good engineer expects: torch.optim.AdamW([p]) makes an object with some dictionaries; the compiler is loaded by those
# who call torch.compile.
# What happens: a method that the constructor calls is kept out of compilation by a decorator that imports torch._dynamo when
# it first runs. That takes two seconds of a processor and some 70 MB that never come back, in every short training,
# evaluation script and worker that makes an optimizer. The fused operation itself (torch._fused_adamw_) needs none of it.
# Seen on Python 3.11, Linux, 2026-12-01.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null

"$work/venv/bin/python" - <<'P'
import sys
import time

import torch

LOADED = ("torch._dynamo", "sympy", "torch.distributed.tensor")


def anonymous_megabytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1000


parameter = torch.nn.Parameter(torch.ones(4))
parameter.grad = torch.ones(4)
mean, square, step = torch.zeros(4), torch.zeros(4), torch.ones(())
with torch.no_grad():
    torch._fused_adamw_([parameter], [parameter.grad], [mean], [square], [], [step], lr=0.1, beta1=0.9, beta2=0.999,
                        weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
before = [name for name in LOADED if name in sys.modules]
modules, memory, start = len(sys.modules), anonymous_megabytes(), time.process_time()
torch.optim.AdamW([parameter], fused=True)
after = [name for name in LOADED if name in sys.modules]
print(f"loaded after a fused step: {before}; after making an optimizer: {after}")
print(f"{len(sys.modules) - modules} more modules, {anonymous_megabytes() - memory} MB, "
      f"{time.process_time() - start:.1f} s of the processor")
assert before == [] and after == list(LOADED), (before, after)
P
# Output seen:
#   loaded after a fused step: []; after making an optimizer: ['torch._dynamo', 'sympy', 'torch.distributed.tensor']
#   823 more modules, 69 MB, 2.9 s of the processor
