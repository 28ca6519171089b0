"""Counts and scores in numpy; nothing here needs torch."""

from denselab.metrics.calibration import CalibrationFigures as CalibrationFigures
from denselab.metrics.calibration import CalibrationScore as CalibrationScore
from denselab.metrics.depth import Align as Align
from denselab.metrics.depth import DepthFigures as DepthFigures
from denselab.metrics.depth import DepthScore as DepthScore
from denselab.metrics.headline import Figures as Figures
from denselab.metrics.headline import Headline as Headline
from denselab.metrics.instance import InstanceFigures as InstanceFigures
from denselab.metrics.instance import InstanceScore as InstanceScore
from denselab.metrics.normals import NormalFigures as NormalFigures
from denselab.metrics.normals import NormalScore as NormalScore
from denselab.metrics.panoptic import PanopticFigures as PanopticFigures
from denselab.metrics.panoptic import PanopticScore as PanopticScore
from denselab.metrics.parsing_covering import CoveringFigures as CoveringFigures
from denselab.metrics.parsing_covering import CoveringScore as CoveringScore
from denselab.metrics.semantic import SemanticFigures as SemanticFigures
from denselab.metrics.semantic import SemanticScore as SemanticScore
from denselab.metrics.semantic import confusion as confusion
