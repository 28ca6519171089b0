"""Every method that quantizes a graph, by the name it has on the command line and in plans."""

from denselab.compress.graph import Graph
from denselab.compress.methods import min_max, repq_vit
from denselab.compress.methods.adalog import ADALOG
from denselab.compress.methods.aphq_vit import APHQ_VIT
from denselab.compress.methods.auto import AUTO
from denselab.compress.methods.dopq_vit import DOPQ_VIT
from denselab.compress.methods.is_vit import IS_VIT
from denselab.compress.methods.lrp_qvit import LRP_QVIT
from denselab.compress.methods.method import Calibration, Method, fitted
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.mix_qvit import MIX_QVIT
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats
from denselab.compress.plan import QuantPlan
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError

METHODS: tuple[Method, ...] = (AUTO, REPQ_VIT, ADALOG, IS_VIT, DOPQ_VIT, APHQ_VIT, LRP_QVIT, MIX_QVIT, MIN_MAX)


def method_named(name: str) -> Method:
    """Raises InputError that lists the methods there are."""
    for method in METHODS:
        if method.name == name:
            return method
    raise InputError(f"method: wanted one of {', '.join(each.name for each in METHODS)}, got {name!r}")


def measuring(method: Method) -> Method:
    """Whose quantizers tell what bits lose: of the method's grids, fitted in seconds.

    Uniform ranges of least error for methods that are uniform everywhere, else RepQ-ViT.
    """
    return PERCENTILES if method in (AUTO, MIN_MAX, APHQ_VIT) else REPQ_VIT


def _percentiles(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    return QuantizedGraph(graph, plan, fitted(graph, stats, plan, repq_vit.fit))


PERCENTILES = Method("percentiles", min_max.spec, _percentiles)
"""Uniform ranges, the best of a few percentiles and the extremes; to measure with, not a published method."""
