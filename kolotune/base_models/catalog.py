"""Base models that kolotune knows by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import packaged_model
from .hub import is_hub_id


@dataclass(frozen=True)
class KnownModel:
    """A base model known by name.

    Attributes:
        name: as the user writes it, in any case.
        source: where it comes from, for display.
        parameters: number of weights.
        needs_token: whether the hub requires a login and an approval.
        hub_id: its name on the hub.
        license: as in the hub's model card.
    """

    name: str
    source: str
    parameters: int
    needs_token: bool
    hub_id: str
    license: str


def _llama(name: str, parameters: int, license: str) -> KnownModel:
    return KnownModel(name, "hub", parameters, True, name, license)


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        packaged_model.NAME,
        "Python package, no account needed",
        134_515_008,
        False,
        packaged_model.HUB_ID,
        "apache-2.0",
    ),
    _llama("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "llama3.2"),
    _llama("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "llama3.2"),
    _llama("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "llama3.1"),
)


def find_known(name: str) -> KnownModel | None:
    """Return the known model of that name, in any case."""
    return next((model for model in KNOWN if model.name.lower() == name.lower()), None)


def canonical_name(name: str) -> str:
    """Return a known model's name in its own spelling, and any other name unchanged."""
    known = find_known(name)
    return known.name if known else name


def hub_id(name: str) -> str:
    """Return the hub's name of a base model; "" for a local folder, whose path stays private."""
    known = find_known(name)
    if known is not None:
        return known.hub_id
    return name if is_hub_id(name) and not path_exists(name) else ""


def path_exists(name: str) -> bool:
    """Whether `name` is a file or folder; False also when no file can have such a name."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False
