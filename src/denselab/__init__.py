"""DenseLab: dense visual prediction that ships."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from denselab._version import __version__ as __version__

if TYPE_CHECKING:
    from denselab._load import load as load
    from denselab.classes import Classes as Classes
    from denselab.errors import InputError as InputError
    from denselab.hub.hugging_face import from_hf as from_hf
    from denselab.hub.kmax import from_kmax as from_kmax
    from denselab.results import DepthMap as DepthMap
    from denselab.results import InstanceSet as InstanceSet
    from denselab.results import JointResult as JointResult
    from denselab.results import NormalMap as NormalMap
    from denselab.results import PanopticMap as PanopticMap
    from denselab.results import Result as Result
    from denselab.results import SemanticMap as SemanticMap

__all__ = [
    "Classes",
    "DepthMap",
    "InputError",
    "InstanceSet",
    "JointResult",
    "NormalMap",
    "PanopticMap",
    "Result",
    "SemanticMap",
    "__version__",
    "from_hf",
    "from_kmax",
    "load",
]

_HOMES = {
    "Classes": "classes",
    "DepthMap": "results",
    "InputError": "errors",
    "InstanceSet": "results",
    "JointResult": "results",
    "NormalMap": "results",
    "PanopticMap": "results",
    "Result": "results",
    "SemanticMap": "results",
    "from_hf": "hub.hugging_face",
    "from_kmax": "hub.kmax",
    "load": "_load",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import denselab` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'denselab' has no attribute {name!r}")
    try:
        home = import_module(f"denselab.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        from denselab.errors import InputError

        mend = 'install the training half with: pip install "denselab[train]"'
        raise InputError(f"{name}: needs {error.name}, which is not installed; {mend}") from error
    value = globals()[name] = getattr(home, name)
    return value
