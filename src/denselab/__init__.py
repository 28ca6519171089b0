"""DenseLab: dense visual prediction that ships."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from denselab._version import __version__ as __version__

if TYPE_CHECKING:
    from denselab._load import load as load
    from denselab.classes import Classes as Classes
    from denselab.errors import InputError as InputError
    from denselab.results import SemanticMap as SemanticMap

__all__ = ["Classes", "InputError", "SemanticMap", "__version__", "load"]

_HOMES = {"Classes": "classes", "InputError": "errors", "SemanticMap": "results", "load": "_load"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import denselab` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'denselab' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"denselab.{_HOMES[name]}"), name)
    return value
