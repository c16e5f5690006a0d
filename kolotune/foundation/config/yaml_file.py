"""Options in YAML: reading a user's file, writing a run's config."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ConfigError

from .layers import ADAPTER_FORM
from .options import OPTIONS, Config, plain_values

if TYPE_CHECKING:
    import yaml

_YAML_LINE_BREAKS = "\x85\u2028\u2029"


def load_file(path: Path) -> dict[str, object]:
    """Read options from a YAML file; keys may be in kebab or snake case.

    Raises:
        ConfigError: the file cannot be read, or is not valid YAML (with the line), or not a mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}", "Give a YAML file; `kolotune init` writes one.") from None
    try:
        loaded = yaml.load(text, Loader=_strict_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}", "Fix that line."
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: contains no options in the form `name: value`", "`kolotune init` writes a sample.")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _strict_loader() -> type[yaml.SafeLoader]:
    """Return YAML's safe loader with duplicate keys as an error; PyYAML alone silently uses the last one."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Strict


def _is_decided_otherwise(name: str, config: Config) -> bool:
    if name == "eval_split":  # without one, it may be given beside the file
        return bool(config.eval_data and config.eval_split)
    return name in ADAPTER_FORM and config.start_from is not None and name not in config.given


def dump(config: Config) -> str:
    """Return the config as YAML for `load_file`.

    Left out is what belongs to one call, what nobody gave where another option decides, and what excludes another.
    """
    import yaml

    values = {
        name: value
        for name, value in plain_values(config, OPTIONS).items()
        if OPTIONS[name].is_saved and value is not None and not _is_decided_otherwise(name, config)
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(each in text for each in _YAML_LINE_BREAKS):  # PyYAML writes them raw, and reads them back as a space
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return text
