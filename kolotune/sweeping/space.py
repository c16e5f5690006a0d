"""The options that a sweep varies: each with some values, or with a range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolotune.foundation import config as configs
from kolotune.foundation.config import OPTIONS, Config, Group, Kind, option_names
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.objectives import LOSS_OPTIONS
from kolotune.stages import train

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

Value = str | int | float
"""The value of a varied option: a choice as text, or a number of a range."""
_LOGARITHMIC_FROM = 10.0  # a range whose ends differ by this factor is searched on a logarithmic scale
_EXAMPLE = "--vary learning_rate=1e-4..1e-3 --vary lora_rank=8,16,32"


@dataclass(frozen=True)
class VariedOption:
    """One option and its possible values.

    Attributes:
        name: of the option.
        choices: values, as text; empty for a range.
        low, high: the ends of a range, both included.
        whole: the range consists of whole numbers.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def distribution(self) -> CategoricalDistribution | FloatDistribution | IntDistribution:
        """Return the values as a distribution of Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        is_logarithmic = self.low > 0 and self.high / self.low >= _LOGARITHMIC_FROM
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=is_logarithmic)
        return FloatDistribution(self.low, self.high, log=is_logarithmic)


def varied_names() -> list[str]:
    """Return the options that can be varied: single values of the training's fingerprint that don't change the loss."""
    names = option_names(kind=Kind.VALUE, stage=train.NAME)
    return [name for name in names if OPTIONS[name].group is Group.TRAINING and name not in LOSS_OPTIONS]


def parse(texts: Sequence[str]) -> list[VariedOption]:
    """Parse the values of `--vary`: ``name=value,value`` or ``name=low..high``.

    Raises:
        ConfigError: there is none, or a name can't be varied, or a range is not valid.
    """
    options: dict[str, VariedOption] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name in LOSS_OPTIONS:
            raise ConfigError(
                f"--vary {text}: {name} changes the loss, by which a sweep compares its trials",
                f"Give all trials the same --{name.replace('_', '-')}, and vary others, as in {_EXAMPLE}",
            )
        if not equals or name not in varied_names():
            raise ConfigError(
                f"--vary {text}: {name or 'it'} is not an option that can be varied",
                f"Name one of {', '.join(varied_names())}, as in {_EXAMPLE}",
            )
        if name in options:
            raise ConfigError(f"--vary {text}: {name} is varied twice", "Give all its values in one --vary.")
        options[name] = _parse_range(name, text, values) if ".." in values else _parse_choices(name, text, values)
    if not options:
        raise ConfigError("there is nothing to vary", f"Name some options: kolotune sweep chats.jsonl {_EXAMPLE}")
    return list(options.values())


def _parse_choices(name: str, text: str, values: str) -> VariedOption:
    choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
    if "" in choices:
        raise ConfigError(f"--vary {text}: a value is missing", f"For example: {_EXAMPLE}")
    return VariedOption(name, choices)


def _parse_range(name: str, text: str, values: str) -> VariedOption:
    ends = [end.strip() for end in values.split("..")]
    default = getattr(Config(), name)
    is_whole = default is None or isinstance(default, int)  # options without a default are whole numbers
    try:
        low, high = (float(int(end)) if is_whole else float(end) for end in ends)
    except ValueError:
        kind = "two whole numbers" if is_whole else "two numbers"
        raise ConfigError(f"--vary {text}: a range is {kind}", f"For example: {_EXAMPLE}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            f"--vary {text}: the first number must be smaller than the second", f"For example: {_EXAMPLE}"
        )
    return VariedOption(name, low=low, high=high, whole=is_whole)


def with_values(config: Config, values: Mapping[str, Value]) -> Config:
    """Return the config with a trial's values, validated like those of the command line.

    Raises:
        ConfigError: a value is not possible.
    """
    base = {name: getattr(config, name) for name in OPTIONS}
    resolved = configs.resolve((base, "the sweep", config.output_dir), (dict(values), "--vary", config.output_dir))
    return dataclasses.replace(resolved, given=config.given | values.keys())


def count_combinations(varied: Sequence[VariedOption]) -> int | None:
    """Return how many trials are possible; None with a range, which has no end of values."""
    counts = [len(option.choices) for option in varied]
    return math.prod(counts) if all(counts) else None
