"""ReMaX: two relaxations of the training of any mask transformer; nothing of them is left at inference.

Sun et al.: ReMaX: Relaxing for Better Training on Efficient Panoptic Segmentation, NeurIPS 2023, section 3.
[recalled] The formulas are from memory and agree with a public re-implementation, xushilin1/remax_deeplab@07ab4e9
projects/ReMaX/kmax_deeplab_head.py; the authors' own code was not found. What is not certain is said where it is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ReMax:
    """How much is relaxed.

    eta: weight of the overlap in the class targets of ReClass [recalled: 0.1]; 0 switches ReClass off.
    relaxed_layers: ReMask gates the masks of that many earlier outputs, first ones first [recalled: 4 of 6]; 0
    switches ReMask off. The final masks are never gated here, since they are used as they are at inference; whether
    the authors gate them is not certain.
    """

    eta: float = 0.1
    relaxed_layers: int = 4


def remask(
    mask_logits: Float[Tensor, "B Q h w"],
    class_logits: Float[Tensor, "B Q D"],
    semantic_logits: Float[Tensor, "B K h w"],
) -> Float[Tensor, "B Q h w"]:
    """Mask logits m + m * (sigmoid(p) sigmoid(s)), p the class logits of the query, s the semantic ones of the pixel.

    Where the semantic branch sees the class of a query, its mask logit counts up to K + 1 times; where it does not,
    once: false positives are left behind instead of penalised (ReMask [recalled]). No gradient reaches s ("stop
    grad" in Fig. 2), nor p: certain for s only. "No object" takes no part: D = K + 1, and
    a channel K of s is not looked at.

    Ours: one semantic branch gates every layer; the paper gives each layer a branch on its own features.
    """
    num_classes = class_logits.shape[2] - 1
    with torch.no_grad():
        class_probs, semantic_probs = class_logits[..., :-1].sigmoid(), semantic_logits[:, :num_classes].sigmoid()
        gate = torch.einsum("bqk,bkhw->bqhw", class_probs, semantic_probs)
    return mask_logits + mask_logits * gate


def reclass(
    class_targets: Float[Tensor, "B Q D"],
    mask_probs: Float[Tensor, "B Q h w"],
    semantic: Float[Tensor, "B K h w"],
    eta: float,
) -> Float[Tensor, "B Q D"]:
    """Class targets y softened by what else a predicted mask covers: eta o + (1 - eta o) y (ReClass [recalled]).

    o[q, k] is the share of the pixels of class k that lie in the predicted mask q; "no object" (D = K + 1) has no
    pixels. Targets no longer add up to 1. semantic: 1 on the pixels of class k. No gradient. That the share is of the
    area of the class, and not of the mask, is as in the re-implementation.
    """
    with torch.no_grad():
        inside = torch.einsum("bqhw,bkhw->bqk", mask_probs, semantic)
        overlap = inside / semantic.sum(dim=(2, 3))[:, None].clamp(min=1e-5)
        padded = torch.cat([overlap, overlap.new_zeros(*overlap.shape[:2], 1)], dim=2)
        return eta * padded + (1 - eta * padded) * class_targets
