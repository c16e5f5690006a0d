"""The verb `models`: base models that kolotune knows by name."""

from __future__ import annotations

from .options import reporter
from .parameters import Json


def models(json: Json = False) -> int:
    """List base models; any hub id or folder with safetensors works too."""
    from kolotune.base_models import catalog, lookup

    rows = [
        (
            known.name,
            f"{known.parameters / 1e6:.0f} M",
            known.source + (", needs a login and an approval" if known.needs_token else ""),
            "yes" if lookup.locate(known.name) else "no",
        )
        for known in catalog.KNOWN
    ]
    reporter(json).table("Base models", ("name", "weights", "from", "on this machine"), rows)
    return 0
