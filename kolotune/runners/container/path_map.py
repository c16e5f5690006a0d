"""Which path on the other side stands for which path on the host, and how texts are translated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from kolotune.foundation import typed_storage
from kolotune.foundation.secrets import Secret
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import RunFolder


class PathMap:
    """Pairs of paths, used to translate messages and files from the other side.

    Args:
        secret: a text that no message may show; empty for none.
    """

    def __init__(self, secret: Secret | None = None) -> None:
        self._pairs: list[tuple[str, str]] = []
        self._secret = secret or Secret()

    def add(self, inside: PurePosixPath, host: Path) -> None:
        """Remember that `inside` stands for `host`."""
        self._pairs.append((str(inside), str(host)))
        self._pairs.sort(key=lambda pair: -len(pair[0]))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs as texts: inside, host."""
        return tuple(self._pairs)

    def to_host(self, text: str) -> str:
        """Return `text` with the host's paths, and with the secret masked."""
        for inside, outside in self._pairs:
            text = text.replace(inside, outside)
        return self._secret.masked(text)

    def event_to_host(self, event: JsonObject) -> JsonObject:
        """Translate every text of an event."""
        return {name: map_texts(value, self.to_host) for name, value in event.items()}

    def rewrite(self, file: Path, target: Path, run: RunFolder) -> None:
        """Translate a file of a run folder that contains paths, before it becomes `target`."""
        if target == run.config:
            import yaml

            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            text = yaml.safe_dump(map_texts(values, self.to_host), sort_keys=False, allow_unicode=True)
        elif target in (run.source, run.job, run.manifest):
            values = typed_storage.parse_json(file.read_text(encoding="utf-8"))
            text = json.dumps(map_texts(values, self.to_host), indent=1) + "\n"
        else:
            return
        file.write_text(text, encoding="utf-8", newline="")


def map_texts(value: object, change: Callable[[str], str]) -> object:
    """Return `value` with every text in it changed, except the keys of mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_texts(element, change) for key, element in value.items()}
    if isinstance(value, list):
        return [map_texts(element, change) for element in value]
    return value
