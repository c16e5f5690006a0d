"""What stands behind `--vary`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError
from kolotune.sweeping.space import Varied, combinations, names, parse, with_values


def test_choices_and_ranges() -> None:
    found = parse(["learning_rate=1e-4..1e-3", "lora-rank=8, 16,8", "epochs=1..4", "--scheduler-type=cosine,linear"])
    assert found == [
        Varied("learning_rate", low=1e-4, high=1e-3),
        Varied("lora_rank", ("8", "16")),
        Varied("epochs", low=1, high=4, whole=True),
        Varied("scheduler_type", ("cosine", "linear")),
    ]
    assert combinations(found) is None
    assert combinations([found[1], found[3]]) == 4


def test_wide_ranges_are_looked_at_by_factors() -> None:
    wide, narrow, whole = parse(["learning_rate=1e-4..1e-3", "lora_dropout=0..0.2", "batch_size=1..32"])
    assert (wide.distribution.log, narrow.distribution.log, whole.distribution.log) == (True, False, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        "", "learning_rate", "learning_rate=", "lora_rank=8,,16", "base_model=a,b", "use_checkpoint=true,false",
        "target_modules=q_proj,v_proj", "lora_rank=1.5..2", "learning_rate=a..b", "epochs=3..3", "learning_rate=1..nan",
        "learning_rate=2e-4..1e-4", "os.system=1,2",
    ],
)  # fmt: skip
def test_what_can_not_be_varied(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([text])
    assert caught.value.hint


def test_nothing_or_twice_the_same() -> None:
    for texts in ([], ["epochs=1,2", "epochs=3..4"]):
        with pytest.raises(ConfigError):
            parse(texts)


def test_values_are_checked_as_those_of_the_command_line(tmp_path: Path) -> None:
    config = configs.resolve(({"output_dir": tmp_path}, "test", tmp_path))
    assert with_values(config, {"lora_rank": "8", "learning_rate": 0.5}).lora_rank == 8
    with pytest.raises(ConfigError, match="lora-rank"):
        with_values(config, {"lora_rank": "0"})


def test_every_name_is_an_option_of_the_training() -> None:
    assert {"learning_rate", "lora_rank", "epochs", "seed"} <= set(names())
    assert not {"train_data", "dtype", "nproc", "quantization"} & set(names())
