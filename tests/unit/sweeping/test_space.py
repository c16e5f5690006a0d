"""The values of `--vary`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError
from kolotune.sweeping.space import VariedOption, count_combinations, parse, varied_names, with_values


def test_choices_and_ranges() -> None:
    options = parse(["learning_rate=1e-4..1e-3", "lora-rank=8, 16,8", "epochs=1..4", "--scheduler-type=cosine,linear"])
    assert options == [
        VariedOption("learning_rate", low=1e-4, high=1e-3),
        VariedOption("lora_rank", ("8", "16")),
        VariedOption("epochs", low=1, high=4, whole=True),
        VariedOption("scheduler_type", ("cosine", "linear")),
    ]
    assert count_combinations(options) is None
    assert count_combinations([options[1], options[3]]) == 4


def test_wide_ranges_are_logarithmic() -> None:
    wide, narrow, whole = parse(["learning_rate=1e-4..1e-3", "lora_dropout=0..0.2", "batch_size=1..32"])
    assert (wide.distribution().log, narrow.distribution().log, whole.distribution().log) == (True, False, True)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "", "learning_rate", "learning_rate=", "lora_rank=8,,16", "base_model=a,b", "use_checkpoint=true,false",
        "target_modules=q_proj,v_proj", "lora_rank=1.5..2", "learning_rate=a..b", "epochs=3..3", "learning_rate=1..nan",
        "learning_rate=2e-4..1e-4", "os.system=1,2",
    ],
)  # fmt: skip
def test_invalid_values_of_vary(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([text])
    assert caught.value.hint


def test_no_option_or_the_same_one_twice() -> None:
    for texts in ([], ["epochs=1,2", "epochs=3..4"]):
        with pytest.raises(ConfigError):
            parse(texts)


def test_values_are_validated_like_those_of_the_command_line(tmp_path: Path) -> None:
    config = configs.resolve(({"output_dir": tmp_path}, "test", tmp_path))
    assert with_values(config, {"lora_rank": "8", "learning_rate": 0.5}).lora_rank == 8
    with pytest.raises(ConfigError, match="lora-rank"):
        with_values(config, {"lora_rank": "0"})


def test_only_options_of_the_training_can_be_varied() -> None:
    assert {"learning_rate", "lora_rank", "epochs", "seed"} <= set(varied_names())
    assert not {"train_data", "dtype", "nproc", "quantization"} & set(varied_names())


@pytest.mark.parametrize("name", ["beta", "simpo-gamma", "desirable_weight", "undesirable_weight"])
def test_what_changes_the_loss_is_not_varied(name: str) -> None:
    with pytest.raises(ConfigError, match="changes the loss") as caught:
        parse([f"{name}=0.1,0.2"])
    assert f"--{name.replace('_', '-')}," in caught.value.hint
    assert name.replace("-", "_") not in varied_names()
