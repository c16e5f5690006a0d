"""A secret prints as stars, and nothing writes it by mistake."""

from __future__ import annotations

import dataclasses
import json
import pickle
import traceback

import pytest

from kolotune.foundation.secrets import STARS, Secret
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.verb import ContainerVerb

TOKEN = "hf_PlantedTokenThatMustNotBeSeen"


def test_a_secret_prints_as_stars_in_every_format() -> None:
    secret = Secret(TOKEN)
    order = ContainerVerb(["run"], paths=PathMap(secret), token=secret)
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r}", f"{[secret]}", f"{ {'a': secret} }"]
    assert not [each for each in [*shown, str(order), repr(vars(order))] if TOKEN in each]
    assert all(STARS in each for each in shown)
    assert secret.reveal() == TOKEN


def test_a_secret_cannot_be_pickled_or_written_as_json() -> None:
    secret = Secret(TOKEN)
    for write in (pickle.dumps, json.dumps, dataclasses.asdict):
        with pytest.raises(TypeError) as error:
            write(secret)  # type: ignore[operator]
        assert TOKEN not in str(error.value)


def test_a_crash_does_not_show_it() -> None:
    def fails(secret: Secret) -> None:
        raise ValueError(f"no: {secret} {secret!r}")

    try:
        fails(Secret(TOKEN))
    except ValueError as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        assert TOKEN not in "".join(shown.format()) and STARS in "".join(shown.format())


def test_it_compares_and_masks() -> None:
    assert Secret(TOKEN) == Secret(TOKEN) != Secret("x")
    assert Secret(TOKEN) != TOKEN
    assert not Secret()
    assert Secret(TOKEN).masked(f"a{TOKEN}b") == f"a{STARS}b"
    assert Secret().masked("ab") == "ab"
