"""Which path inside the container stands for which one on the host, and texts that name them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from kolotune.foundation.secrets import Secret
from kolotune.run_folder.layout import RunFolder


class Paths:
    """Pairs of paths; messages from inside are told with the host's.

    Args:
        secret: what no message may show; an empty one for none.
    """

    def __init__(self, secret: Secret | None = None) -> None:
        self._pairs: list[tuple[str, str]] = []
        self._secret = secret or Secret()

    def add(self, inside: PurePosixPath, host: Path) -> None:
        """Remembers a pair."""
        self._pairs.append((str(inside), str(host)))
        self._pairs.sort(key=lambda pair: -len(pair[0]))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What was added, as texts: inside, host."""
        return tuple(self._pairs)

    def host(self, text: str) -> str:
        """`text` with the host's paths in place of those inside."""
        for inside, outside in self._pairs:
            text = text.replace(inside, outside)
        return self._secret.masked(text)

    def rewrite(self, file: Path, target: Path, run: RunFolder) -> None:
        """Puts the host's paths into a file of a run folder that names paths, before it becomes `target`."""
        if target == run.config:
            import yaml

            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            text = yaml.safe_dump(deep(values, self.host), sort_keys=False, allow_unicode=True)
        elif target in (run.source, run.job, run.manifest):
            text = json.dumps(deep(json.loads(file.read_text(encoding="utf-8")), self.host), indent=1) + "\n"
        else:
            return
        file.write_text(text, encoding="utf-8", newline="")


def deep(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed; keys of mappings stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: deep(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [deep(each, change) for each in value]
    return value
