"""From any PyTorch vision model to mixed-precision integers, in steps that can each be saved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from denselab.compress.plan import QuantPlan as QuantPlan
    from denselab.compress.steps import capture as capture
    from denselab.compress.steps import choose_plan as choose_plan
    from denselab.compress.steps import export as export
    from denselab.compress.steps import observe as observe
    from denselab.compress.steps import quantize as quantize

__all__ = ["QuantPlan", "capture", "choose_plan", "export", "observe", "quantize"]

_HOMES = {"QuantPlan": "plan", **dict.fromkeys(("capture", "choose_plan", "export", "observe", "quantize"), "steps")}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'denselab.compress' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"denselab.compress.{_HOMES[name]}"), name)
    return value
