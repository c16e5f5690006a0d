"""kolotune as on Windows or macOS: its own modules see what Python has there; other packages see this system.

Each module of kolotune gets an ``import`` of its own. It refuses modules that the other system does not have, and
returns others without the names that are missing there. Which these are is read from the standard library's type stubs.
What can't be shown here is how the other system itself behaves: paths, locks, files that can't be replaced while they
are mapped.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "kolotune"
_STUBS = "mypy/typeshed/stdlib"
_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "win32": {
        "sys": {"platform": "win32"},
        "os": {"name": "nt", "open": lambda *arguments, **options: _open_no_folder(*arguments, **options)},
        "platform": {"system": lambda: "Windows"},
        "subprocess": {"DETACHED_PROCESS": 0, "CREATE_NEW_PROCESS_GROUP": 0},  # no flags of this system
    },
    "darwin": {"sys": {"platform": "darwin"}, "platform": {"system": lambda: "Darwin"}},
}


class Stub:
    """A module of the standard library as its type stub describes it."""

    def __init__(self, name: str) -> None:
        folder = next(path for each in sys.path if (path := Path(each, _STUBS)).is_dir())
        file = folder.joinpath(*name.split("."))
        path = file / "__init__.pyi" if file.is_dir() else file.with_suffix(".pyi")
        self._tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None

    def missing(self, platform: str) -> frozenset[str]:
        """Return the names that are here and not on the other system."""
        if self._tree is None:
            return frozenset()
        return frozenset(_names(self._tree.body, sys.platform)) - frozenset(_names(self._tree.body, platform))

    def is_only_here(self, platform: str) -> bool:
        """Whether the whole module is missing on the other system."""
        if self._tree is None:
            return False
        return bool(self.missing(platform)) and not any(
            name for name in _names(self._tree.body, platform, with_imports=False) if not name.startswith("_")
        )


def _names(body: Sequence[ast.stmt], platform: str, with_imports: bool = True) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If):
            yield from _names(node.body if _holds(node.test, platform) else node.orelse, platform, with_imports)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.ImportFrom) and with_imports:
            yield from (each.asname or each.name for each in node.names)


def _holds(test: ast.expr, platform: str) -> bool:
    seen = types.SimpleNamespace(platform=platform, version_info=sys.version_info)
    return bool(eval(compile(ast.Expression(test), "stub", "eval"), {"sys": seen, "TYPE_CHECKING": True}))


class _Module(types.ModuleType):
    """A module of the standard library as on the other system."""

    def __init__(self, real: types.ModuleType, missing: frozenset[str], values: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(values, _real=real, _missing=missing)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


def _open_no_folder(path: Any, *arguments: Any, **options: Any) -> int:
    import os

    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *arguments, **options)


@cache
def _module(name: str, platform: str) -> types.ModuleType:
    stub = Stub(name)
    if stub.is_only_here(platform):
        raise ModuleNotFoundError(f"No module named {name!r} on this system", name=name)
    real = importlib.import_module(name)
    missing, values = stub.missing(platform), _VALUES[platform].get(name, {})
    return _Module(real, missing, values) if missing or values else real


class Loader(importlib.machinery.SourceFileLoader):
    """Runs a module with such an ``import``."""

    def __init__(self, name: str, path: str, platform: str) -> None:
        super().__init__(name, path)
        self._platform = platform

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        super().exec_module(module)

    def _import(self, name: str, scope: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if level == 0 and name.partition(".")[0] in sys.stdlib_module_names:
            module = _module(name, self._platform)
            return module if wanted or "." not in name else _module(name.partition(".")[0], self._platform)
        return builtins.__import__(name, scope, local, wanted, level)


class _Finder:
    def __init__(self, platform: str) -> None:
        self._platform = platform

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin, self._platform)
        return spec


def install(platform: str) -> None:
    """Let this process load kolotune as on another system: win32 or darwin."""
    assert PACKAGE not in sys.modules
    sys.meta_path.insert(0, _Finder(platform))  # type: ignore[arg-type]


def sitecustomize(platform: str) -> str:
    """Return a module that does so in each Python process whose path begins with its folder."""
    lines = (
        "import sys",
        f"sys.path.append({str(Path(__file__).parents[1])!r})",
        "from support import other_systems",
        f"other_systems.install({platform!r})",
    )
    return "\n".join(lines)
