"""How threads that compute together wait for each other: they sleep, and leave the core to what has work.

By default OpenMP's threads spin at the end of each piece of work until the last one is there. Beside another busy
process that one waits for a core, and the spinning threads hold it. PyTorch and llama.cpp use GNU's OpenMP on Linux,
elsewhere LLVM's or Intel's. Both read variables once, when they are loaded, so a process is started with them.
"""

from __future__ import annotations

SLEEPING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Variables of processes that compute. A user's own values come first."""
