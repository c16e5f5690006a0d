"""Names that Ollama accepts, and names that it refuses."""

from __future__ import annotations

import pytest

from kolotune.foundation.errors import ConfigError
from kolotune.ollama.model_name import check_name

LONG = "a" * 80


@pytest.mark.parametrize(
    "name",
    [
        "my-model", "m", "_m", "0", "Model.v1", "me/model", "me/model:q8_0", "model:latest",
        "example.com/me/model:7b", "localhost:5000/me/model:7b-q4", f"{LONG}/{LONG}:{LONG}",
    ],
)  # fmt: skip
def test_good(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "-m", ".m", "my model", "model:", ":tag", "/model", "me/", "a/b/c/d", "m.e/model", "model:a:b",
        "model:-a", "model@sha256:00", "../../etc", "me/../model", "model\n", "modèle", f"{LONG}a",
        f"model:{LONG}a", "http://localhost/me/model",
    ],
)  # fmt: skip
def test_bad(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_name(name)
    assert "model[:tag]" in error.value.hint


@pytest.mark.parametrize("name", ["model:cloud", "me/model:7b-Cloud", "model:LOCAL"])
def test_tags_that_say_where_a_model_runs(name: str) -> None:
    with pytest.raises(ConfigError, match="where a model runs"):
        check_name(name)
    assert check_name(name.partition(":")[0] + ":cloudy")
