"""Surface normals: a QueryOutput becomes unit vectors."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from denselab.tasks.blend import at_source, blended
from denselab.types import HeadSpec, QueryOutput


def raw_normals(
    output: QueryOutput, spec: HeadSpec, size_hw: tuple[int, int], network_hw: tuple[int, int] | None = None
) -> Float[Tensor, "B 3 H W"]:
    """Blended vectors at every input pixel, upsampled, of any length: what losses take."""
    return at_source(blended(output, spec), spec.mask_stride, size_hw, network_hw)


def normals(
    output: QueryOutput, spec: HeadSpec, size_hw: tuple[int, int], network_hw: tuple[int, int] | None = None
) -> Float[Tensor, "B 3 H W"]:
    """Unit normals in camera axes (x right, y down, z forward) at every input pixel."""
    return F.normalize(raw_normals(output, spec, size_hw, network_hw), dim=1, eps=1e-6)
