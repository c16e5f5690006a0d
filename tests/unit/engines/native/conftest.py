"""What several tests of the training step need."""

from __future__ import annotations

import pytest

from kolotune.engines.native.kernels import build


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Return whether the compiled kernels are used; tests run both with and without them."""
    if request.param and build.reason_unavailable():
        pytest.skip(f"can't be compiled: {build.reason_unavailable()}")
    return bool(request.param)
