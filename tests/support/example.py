"""The scripts of the examples, which are in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def example_script(name: str, script: str) -> ModuleType:
    """Import a script of an example: ``example_script("tools", "judge")``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}_{script}", EXAMPLES / name / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
