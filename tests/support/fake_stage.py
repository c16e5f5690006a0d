"""A stage that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.foundation.config import Config
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.stage import Context


@dataclass
class FakeStage:
    """A stage whose every answer can be set."""

    NAME: str = "fake"
    DOING: str = "faking"
    chosen: JsonObject = field(default_factory=lambda: {"lora_rank": 8, "quantization": ("Q4_K_M", "Q8_0")})
    files: dict[str, Path] = field(default_factory=dict)
    made: list[Path] = field(default_factory=list)
    needs: Sequence[str] = ("pydantic",)

    def options(self, config: Config) -> JsonObject:
        return self.chosen

    def inputs(self, context: Context) -> dict[str, Path]:
        return self.files

    def outputs(self, context: Context) -> list[Path]:
        return self.made

    def packages(self) -> Sequence[str]:
        return self.needs

    def preflight(self, context: Context, reporter: Reporter) -> None: ...

    def run(self, context: Context, reporter: Reporter) -> JsonObject:
        return {}
