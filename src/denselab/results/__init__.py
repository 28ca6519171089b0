"""What a user gets from a model: plain numpy, at the size of the image, checked when made."""

from denselab.results.depth import DepthMap as DepthMap
from denselab.results.instance import InstanceSet as InstanceSet
from denselab.results.joint import JointResult as JointResult
from denselab.results.normals import NormalMap as NormalMap
from denselab.results.panoptic import PanopticMap as PanopticMap
from denselab.results.result import Result as Result
from denselab.results.semantic import SemanticMap as SemanticMap
