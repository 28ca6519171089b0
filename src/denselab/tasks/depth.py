"""Depth: a QueryOutput becomes metres."""

from jaxtyping import Float
from torch import Tensor

from denselab.tasks.blend import at_source, blended
from denselab.types import HeadSpec, QueryOutput


def depth_m(
    output: QueryOutput, spec: HeadSpec, size_hw: tuple[int, int], network_hw: tuple[int, int] | None = None
) -> Float[Tensor, "B H W"]:
    """Metres along the optical axis at every input pixel: the blended values (PolyMaX), upsampled bilinearly."""
    return at_source(blended(output, spec), spec.mask_stride, size_hw, network_hw)[:, 0]
