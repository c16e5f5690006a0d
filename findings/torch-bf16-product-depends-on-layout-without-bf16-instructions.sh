#!/usr/bin/env bash
# torch 2.13.0, bf16 on an x86 processor without bf16 instructions: the product that gives a linear layer's gradient of its
# input is tens of times slower than the layer itself, because of the order in which the weight lies in memory.
#
# A good engineer expects: without instructions for it, bf16 is computed by way of fp32, a few times slower than fp32,
# forward and backward alike; a training in bf16 then takes a few times as long.
# What happens: `x @ w.T` is a few times slower than in fp32, `g @ w`, the same product with the weight transposed, some fifty
# to a hundred times: a loop over single numbers computes it. A copy of the weight in the other order makes it fast again.
# A training step has one of each for every layer, so it takes some thirty times as long, and a profile of the forward
# pass alone doesn't show it.
# The processor is held to AVX2, so that it shows on newer ones, too. Seen on an AMD EPYC with AVX2, Python 3.11, Linux,
# 2026-12-01. Speeds vary between machines; the factor between the two orders is what is asserted.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null

ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 "$work/venv/bin/python" - <<'P'
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)


def rate(product) -> float:
    """Return GFLOP/s, the best of five."""
    product()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * 100 * 1024 * 1024 / min(seconds) / 1e9


rates = {}
for dtype in (torch.float32, torch.bfloat16):
    rows, weight = torch.randn(100, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    other_order = weight.T.contiguous()
    name = str(dtype).removeprefix("torch.")
    rates[name, "x @ w.T"] = rate(lambda: rows @ weight.T)
    rates[name, "g @ w"] = rate(lambda: rows @ weight)
    rates[name, "g @ w, w in the other order"] = rate(lambda: rows @ other_order.T)
for (name, product), value in rates.items():
    print(f"{name:9} {product:28} {value:6.2f} GFLOP/s")
slow, fast = rates["bfloat16", "g @ w"], rates["bfloat16", "g @ w, w in the other order"]
print(f"bfloat16: the other order is {fast / slow:.0f} times as fast")
assert fast > 5 * slow, (fast, slow)
assert rates["float32", "g @ w"] > 20 * slow, rates
P
# Output seen:
#   float32   x @ w.T                       23.53 GFLOP/s
#   float32   g @ w                         36.83 GFLOP/s
#   float32   g @ w, w in the other order   42.26 GFLOP/s
#   bfloat16  x @ w.T                        5.08 GFLOP/s
#   bfloat16  g @ w                          0.39 GFLOP/s
#   bfloat16  g @ w, w in the other order    5.18 GFLOP/s
#   bfloat16: the other order is 13 times as fast
