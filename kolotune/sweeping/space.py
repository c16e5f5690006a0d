"""What a sweep varies: an option of the training with some values, or with a range of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_LOGARITHMIC_FROM = 10.0  # a range whose ends are so many times apart is looked at by factors
_NOT_VARIED = ("checkpoint_steps", "use_checkpoint", "target_modules")  # nothing of the result; a list of names
_EXAMPLE = "--vary learning_rate=1e-4..1e-3 --vary lora_rank=8,16,32"


@dataclass(frozen=True)
class Varied:
    """One option and the values that it may have.

    Attributes:
        name: of the option.
        choices: values, as text; empty for a range.
        low, high: the ends of a range, both possible.
        whole: whether values between them are whole numbers.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        by_factors = self.low > 0 and self.high / self.low >= _LOGARITHMIC_FROM
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=by_factors)
        return FloatDistribution(self.low, self.high, log=by_factors)


def names() -> list[str]:
    """The options that can be varied."""
    return [
        field.name
        for field in dataclasses.fields(Config)
        if field.metadata["kind"] == "training" and field.name not in _NOT_VARIED
    ]


def parse(texts: Sequence[str]) -> list[Varied]:
    """Reads what stands behind `--vary`: ``name=value,value`` or ``name=low..high``.

    Raises:
        ConfigError: a name that can't be varied, or none, or a range that is none.
    """
    found: dict[str, Varied] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in names():
            raise ConfigError(
                f"--vary {text}: {name or 'it'} is no option that can be varied",
                f"Name one of {', '.join(names())}, as in {_EXAMPLE}",
            )
        if name in found:
            raise ConfigError(f"--vary {text}: {name} is varied twice", "Give all its values at once.")
        found[name] = _range(name, text, values) if ".." in values else _choices(name, text, values)
    if not found:
        raise ConfigError("nothing is varied", f"Say what: kolotune sweep chats.jsonl {_EXAMPLE}")
    return list(found.values())


def _choices(name: str, text: str, values: str) -> Varied:
    choices = tuple(dict.fromkeys(each.strip() for each in values.split(",")))
    if "" in choices:
        raise ConfigError(f"--vary {text}: a value is missing", f"Give some, as in {_EXAMPLE}")
    return Varied(name, choices)


def _range(name: str, text: str, values: str) -> Varied:
    ends = [each.strip() for each in values.split("..")]
    whole = isinstance(_default(name), int)
    try:
        low, high = (float(int(each)) if whole else float(each) for each in ends)
    except ValueError:
        kind = "two whole numbers" if whole else "two numbers"
        raise ConfigError(f"--vary {text}: a range has {kind}", f"As in {_EXAMPLE}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--vary {text}: the first number is not the smaller one", f"As in {_EXAMPLE}")
    return Varied(name, low=low, high=high, whole=whole)


def _default(name: str) -> Any:
    """A value of the option's type; those without a default are whole numbers."""
    value = getattr(Config(), name)
    return 1 if value is None else value


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with a trial's values, checked as those of the command line.

    Raises:
        ConfigError: a value is not possible.
    """
    return configs.resolve(
        (dataclasses.asdict(config), "the sweep", config.output_dir), (dict(values), "--vary", config.output_dir)
    )


def combinations(varied: Sequence[Varied]) -> int | None:
    """How many trials there can be; None where a range has no end of them."""
    counts = [len(each.choices) for each in varied]
    return math.prod(counts) if all(counts) else None
