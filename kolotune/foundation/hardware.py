"""What this machine has: devices, fast dtypes, memory, and what the last bits of a result depend on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Literal

from kolotune.version import VERSION

_DEVICES = Path("/dev")
# The kernel's counters of processes killed because memory ran out: of this container (control groups v2), or of all.
_KILL_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))

# Instructions and variables that change the order of sums, and with it the last bits of a result.
_INSTRUCTIONS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "bf16", "i8mm", "sve",
)  # fmt: skip
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR",
    "CUBLAS_WORKSPACE_CONFIG", "OPENBLAS_CORETYPE",
)  # fmt: skip


def best_device() -> str:
    """Return the first of "cuda", "mps" and "cpu" that PyTorch can use here."""
    if not _may_have_gpu():  # saves loading PyTorch
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype() -> Literal["bf16", "fp32"]:
    """Return "bf16" if products of bf16 matrices are fast here, else "fp32".

    A processor without bf16 instructions converts to fp32 and back, which is slower than fp32 itself.
    """
    if importlib.util.find_spec("torch") is None:
        return "fp32"
    device = best_device()
    if device == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cpu" and _cpu_has_bf16() else "fp32"


def computes_slowly_in(dtype: str) -> bool:
    """Whether training in a dtype takes long beside fp32: bf16 without instructions for it; only Linux says so."""
    return dtype == "bf16" and bool(_cpu_words()) and not _cpu_has_bf16() and best_device() == "cpu"


def machine() -> dict[str, str]:
    """Return what the last bits of a result may depend on besides inputs: versions, processor, cores, settings."""
    facts = {
        "kolotune": VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": " ".join(each for each in _INSTRUCTIONS if each in _cpu_words()),
        "cores": str(cores()),
    }
    return facts | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def cores() -> int:
    """Return how many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    for line in _cpu_text().splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _may_have_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD is loaded. On other systems than Linux only PyTorch knows."""
    if platform.system() != "Linux":
        return True
    return any(any(_DEVICES.glob(name)) for name in ("nvidia*", "kfd", "dxg"))


def has_nvidia_device() -> bool:
    """Whether PyTorch's CUDA build would find a device here; asks neither PyTorch nor the driver."""
    if sys.platform != "linux":
        return shutil.which("nvidia-smi") is not None
    return any(any(_DEVICES.glob(name)) for name in ("nvidia[0-9]*", "dxg"))


def lacks_avx2() -> bool:
    """Whether this is an x86-64 processor without AVX2; only Linux says so."""
    return "sse2" in _cpu_words() and "avx2" not in _cpu_words()


def has_avx512() -> bool:
    """Whether the processor has AVX-512; only Linux says so."""
    return "avx512f" in _cpu_words()


def _cpu_has_bf16() -> bool:
    return bool(_cpu_words() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_words() -> set[str]:
    return set(_cpu_text().split())


def _cpu_text() -> str:
    """Return Linux's description of the processors; "" on other systems."""
    if platform.system() != "Linux":
        return ""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def free_memory() -> int:
    """Return the bytes that a new process can allocate, within the limits of the machine and of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limited = _left_of_limit(Path("/sys/fs/cgroup"))
    return free if limited is None else min(free, limited)


def free_on(device: str) -> int:
    """Return the bytes that this process can still allocate for tensors on a device."""
    if device != "cuda":
        return free_memory()
    import torch

    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # held by PyTorch, and free
    return int(torch.cuda.mem_get_info()[0]) + cached


def memory_for_processes(count: int) -> int:
    """Return the bytes for models in `count` processes together: the free memory, or that of a GPU for each."""
    if best_device() != "cuda":
        return free_memory()
    import torch

    return count * int(torch.cuda.get_device_properties(0).total_memory)


def _left_of_limit(group: Path) -> int | None:
    """Return what a control group's limit leaves, with its cached files counted as free; None if it has no limit."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    droppable = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))
    return max(0, int(limit) - used + droppable)


def kills_for_memory(*, own: bool = False) -> int | None:
    """Return how many processes the kernel has killed because memory ran out; None if it does not count them.

    Args:
        own: count only those of this process's control group, if it is in one.
    """
    for counter in [*(_own_counters() if own else ()), *_KILL_COUNTERS]:
        with contextlib.suppress(OSError, ValueError):
            for line in counter.read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None


def _own_counters() -> list[Path]:
    """Return the counters of this process's control group, of version 1 or 2."""
    counters = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                counters.append(Path(f"/sys/fs/cgroup{group}/memory.events"))
            elif "memory" in controllers.split(","):
                counters.append(Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control"))
    return counters


def peak_memory() -> tuple[int, int]:
    """Return the peak memory of this process, and how much of its memory now is of mapped files, in bytes."""
    import psutil

    now = psutil.Process().memory_info()
    mapped = int(getattr(now, "shared", 0))
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return int(now.rss), mapped
    peak = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), int(now.rss))
    return peak, mapped
