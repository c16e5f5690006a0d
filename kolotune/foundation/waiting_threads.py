"""How threads that compute together wait for each other: they spin for a moment, then leave the core to other work.

By default OpenMP's threads spin for milliseconds at the end of each piece of work, until the last one is there. Beside
another busy process that one waits for a core, and the spinning threads hold it. PyTorch and llama.cpp use GNU's OpenMP
on Linux, elsewhere LLVM's or Intel's. They read variables once, when they are loaded: a process is started with them.
"""

from __future__ import annotations

SHORT_WAITS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Variables of processes that compute; 2,000 spins are some 0.1 ms. A user's own values come first."""
