"""The options of a run: what each one is, how flags, files and defaults meet, and how they are saved."""

from __future__ import annotations

from .layers import ADAPTER_FORM, Layer, resolve
from .normalize import normalize
from .option import Group, Kind, Option
from .options import (
    DEFAULT_HOST,
    DEFAULT_MAX_TOKENS,
    DEFAULT_OUTPUT_DIR,
    DEFAULT_PARALLEL,
    DEFAULT_PORT,
    DEFAULT_SEED,
    DEFAULT_TEMPERATURE,
    OPTIONS,
    Config,
    option_names,
    plain_values,
    stage_options,
)
from .yaml_file import dump, load_file

__all__ = [
    "ADAPTER_FORM", "DEFAULT_HOST", "DEFAULT_MAX_TOKENS", "DEFAULT_OUTPUT_DIR", "DEFAULT_PARALLEL", "DEFAULT_PORT",
    "DEFAULT_SEED", "DEFAULT_TEMPERATURE", "OPTIONS", "Config", "Group", "Kind", "Layer", "Option", "dump", "load_file",
    "normalize", "option_names", "plain_values", "resolve", "stage_options",
]  # fmt: skip
