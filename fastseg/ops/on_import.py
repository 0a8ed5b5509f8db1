"""What other modules are told when they are imported: `import fastseg` doesn't wait for them."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, tell: Callable[[ModuleType], None]) -> None:
    """Calls ``tell`` with a module: now, where it is imported already, else as soon as it is."""
    if name in sys.modules:
        tell(sys.modules[name])
    else:
        sys.meta_path.insert(0, _OnImport(name, tell))


class _OnImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as Python would, then calls."""

    def __init__(self, name: str, tell: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.tell = tell

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # so that the search that follows, and later ones, are Python's own
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.tell(module)
