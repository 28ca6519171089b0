"""One image and its truths as tensors, for views and batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from denselab.classes import VOID
from denselab.segments import Segment


@dataclass(frozen=True)
class Sample:
    """An image and what is true of it, as tensors; None for what was not asked for.

    image: uint8 [3, H, W]. class_ids: uint8 [H, W], void 255. layers: int32 [L, H, W], ids of `segments`, 0 none.
    void: bool [H, W], see `Truth.void`. depth_m: float32 [H, W], 0 unknown. normals: float32 [3, H, W], zeros unknown.
    """

    image: UInt8[Tensor, "3 H W"]
    class_ids: UInt8[Tensor, "H W"] | None = None
    layers: Int[Tensor, "L H W"] | None = None
    segments: tuple[Segment, ...] = ()
    void: Bool[Tensor, "H W"] | None = None
    depth_m: Float[Tensor, "H W"] | None = None
    normals: Float[Tensor, "3 H W"] | None = None

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.image.shape[-2], self.image.shape[-1]

    def moved(self, image: Tensor, move: Callable[[Tensor, float], Tensor], void: int = VOID) -> "Sample":
        """The sample with another image, every truth moved by `move(truth, fill)`.

        fill: what comes in from outside, which is void, in no segment, and of unknown depth and normal.
        """
        return replace(
            self,
            image=image,
            class_ids=None if self.class_ids is None else move(self.class_ids, void),
            layers=None if self.layers is None else move(self.layers, 0),
            void=None if self.void is None else move(self.void, 1),
            depth_m=None if self.depth_m is None else move(self.depth_m, 0),
            normals=None if self.normals is None else move(self.normals, 0),
        )
