"""Losses for surface normals, over pixels whose normal is known.

Do et al.: Surface Normal Estimation of Tilted Images, ECCV 2020 (the truncated angular loss [recalled]);
Yang et al.: PolyMaX, WACV 2024, section 4 [recalled: both an angular and an L2 loss; their weights are ours].
"""

import math
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from denselab.losses.depth import known_mean
from denselab.losses.weighted import check_weights, weighted_sum

_ALIGNED = 1 - 1e-6  # cosine from which on the angle is taken as 0


@dataclass(frozen=True)
class NormalsLossWeights:
    """How much each loss of `normals_loss` counts; those at 0 are not computed. Raises InputError if none counts.

    cosine: 1 - cos of the angle between. angular: truncated angular, in radians. l2: squared distance of the
    prediction, at its own length, to the true unit vector.
    """

    cosine: float = 0.0
    angular: float = 1.0
    l2: float = 1.0

    def __post_init__(self) -> None:
        """Check the weights."""
        check_weights("normals", asdict(self))


DEFAULT_WEIGHTS = NormalsLossWeights()


def normals_loss(
    pred: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"], weights: NormalsLossWeights = DEFAULT_WEIGHTS
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses in float32, and each by name, unweighted and detached.

    pred: of any length. target: unit, zeros where unknown. Mean over the known pixels of an image, then over images
    that have any. Of a prediction made unit, L2 would be twice the cosine loss again; at its own length it also
    keeps vectors near unit length, where the gradient of normalising them neither vanishes nor explodes.
    """
    known = target.square().sum(dim=1) > 0.25
    pred, target = pred.float(), target.float()
    cosine = (F.normalize(pred, dim=1, eps=1e-6) * target).sum(dim=1)
    losses = {
        "cosine": lambda: known_mean(1 - cosine, known),
        "angular": lambda: known_mean(truncated_angle(cosine), known),
        "l2": lambda: known_mean((pred - target).square().sum(dim=1), known),
    }
    return weighted_sum(losses, asdict(weights))


def truncated_angle(cosine: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """arccos in radians where its gradient is sound: 0 above cosine 1 - 1e-6, pi/2 - cosine below 0 (Do et al.).

    The gradient of arccos has no bound at 1 and -1. The straight continuation below 0 has slope -1 there as arccos.
    """
    angle = cosine.clamp(0, _ALIGNED).acos().where(cosine < _ALIGNED, 0)
    return angle.where(cosine > 0, math.pi / 2 - cosine)
