"""The tables of docs/scaling.md are what the formulas say."""

from __future__ import annotations

import scaling_model

from kolotune.base_models.catalog import KNOWN
from kolotune.weights.model_shape import AdapterShape


def test_the_page_has_the_tables_that_the_formulas_make() -> None:
    text = scaling_model.PAGE.read_text(encoding="utf-8")
    assert scaling_model.tables() in text, "python bench/scaling_model.py --write"


def test_the_shapes_have_as_many_weights_as_the_models() -> None:
    known = {each.name.rpartition("/")[2].removesuffix("-Instruct"): each.parameters for each in KNOWN}
    for model in scaling_model.MODELS[:3]:
        assert model.shape().weight_count == known[model.name.replace(" ", "-")]
    assert abs(scaling_model.MODELS[3].shape().weight_count / 70.55e9 - 1) < 0.001


def test_a_base_sharded_over_more_processes_takes_less_memory() -> None:
    for model in scaling_model.MODELS:
        adapter = AdapterShape.of(model.shape(), scaling_model.RANK, ["all-linear"])
        assert scaling_model.held(model.shape(), adapter, 8) > scaling_model.held(model.shape(), adapter, 64)
