"""Losses for per-pixel class scores, with an ignored id."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from denselab.errors import InputError


def cross_entropy(
    logits: Float[Tensor, "B K H W"],
    target: Int[Tensor, "B H W"],
    ignore: int = 255,
    class_weights: Float[Tensor, "K"] | None = None,
) -> Tensor:
    """Mean cross entropy over labelled pixels, weighted by class; 0 when every pixel is ignored."""
    total = F.cross_entropy(logits, target, class_weights, ignore_index=ignore, reduction="sum")
    labelled = target != ignore
    weight = labelled.sum() if class_weights is None else class_weights[target[labelled]].sum()
    return total / weight.clamp(min=1e-6)


def dice(logits: Float[Tensor, "B K H W"], target: Int[Tensor, "B H W"], ignore: int = 255) -> Tensor:
    """1 - mean over present classes of the soft Dice coefficient 2 sum(p t) / (sum p + sum t), over the batch.

    Milletari et al. 2016, eq. 1, without squares, on softmax probabilities; ignored pixels count nowhere.
    """
    labelled = target != ignore
    one_hot = F.one_hot(target.where(labelled, 0).long(), logits.shape[1]).movedim(-1, 1)
    mask = labelled[:, None].to(logits.dtype)
    truth = one_hot.to(logits.dtype) * mask
    probs = logits.softmax(dim=1) * mask
    overlap = (probs * truth).sum(dim=(0, 2, 3))
    total = probs.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    present = truth.sum(dim=(0, 2, 3)) > 0
    coefficient = (2 * overlap / total.clamp(min=1e-6))[present]
    return 1 - coefficient.mean() if coefficient.numel() else probs.sum() * 0


def ohem_cross_entropy(
    logits: Float[Tensor, "B K H W"],
    target: Int[Tensor, "B H W"],
    ignore: int = 255,
    class_weights: Float[Tensor, "K"] | None = None,
    threshold: float = 0.7,
    min_kept: float = 1 / 16,
) -> Tensor:
    """Cross entropy over the hard pixels only: those whose true class has a probability below `threshold`.

    Online hard example mining (Shrivastava et al. 2016) per pixel as in BiSeNet (Yu et al. 2018): pixels with loss
    above -ln(threshold), and never fewer than the `min_kept` share of the labelled ones with the highest loss.
    Class weights weigh the mean but not the choice. 0 when every pixel is ignored.
    """
    labelled = target != ignore
    losses = F.cross_entropy(logits, target, ignore_index=ignore, reduction="none")[labelled]
    with torch.no_grad():
        fewest = math.ceil(min_kept * losses.numel())
        hard = losses > -math.log(threshold)
        if hard.sum() < fewest:
            hard = torch.zeros_like(hard).scatter(0, losses.topk(fewest).indices, True)
    weights = torch.ones_like(losses) if class_weights is None else class_weights[target[labelled]]
    return (losses * weights)[hard].sum() / weights[hard].sum().clamp(min=1e-6)


def lovasz_softmax(logits: Float[Tensor, "B K H W"], target: Int[Tensor, "B H W"], ignore: int = 255) -> Tensor:
    """Mean over present classes of the Lovasz extension of the Jaccard loss at that class's errors, over the batch.

    Berman et al. 2018, algorithm 1 on the errors 1 - p (pixels of the class) and p (others), p the softmax
    probability, labelled pixels only; as LovaszSoftmax@188332e pytorch/lovasz_losses.py:173 with only_present.
    0 when every pixel is ignored.
    """
    labelled = target != ignore
    probs = logits.softmax(dim=1).movedim(1, -1)[labelled]
    truth = target[labelled]
    losses = [_lovasz_jaccard((truth == each).to(probs.dtype), probs[:, each]) for each in truth.unique().tolist()]
    return torch.stack(losses).mean() if losses else probs.sum()


def _lovasz_jaccard(truth: Float[Tensor, "P"], probs: Float[Tensor, "P"]) -> Tensor:
    """Sorted errors times the growth of the Jaccard loss as pixel after pixel is got wrong; `truth` has a 1."""
    errors, order = (truth - probs).abs().sort(descending=True)
    truth = truth[order]
    missed, added = truth.cumsum(0), (1 - truth).cumsum(0)
    jaccard_loss = 1 - (truth.sum() - missed) / (truth.sum() + added)
    return (errors * jaccard_loss.diff(prepend=jaccard_loss.new_zeros(1))).sum()


@dataclass(frozen=True)
class LossWeights:
    """How much each loss of `pixel_loss` counts; those at 0 are not computed. Raises InputError if none counts."""

    cross_entropy: float = 1.0
    ohem: float = 0.0
    dice: float = 0.0
    lovasz: float = 0.0

    def __post_init__(self) -> None:
        """Check the weights."""
        values = (self.cross_entropy, self.ohem, self.dice, self.lovasz)
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise InputError(f"loss weights: wanted numbers >= 0, one of them above 0, got {self}")


def pixel_loss(
    logits: Float[Tensor, "B K H W"],
    target: Int[Tensor, "B H W"],
    weights: LossWeights,
    ignore: int = 255,
    class_weights: Float[Tensor, "K"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses in float32, and each of them by name, unweighted and detached, for the log."""
    logits = logits.float()
    losses = {
        "cross_entropy": lambda: cross_entropy(logits, target, ignore, class_weights),
        "ohem": lambda: ohem_cross_entropy(logits, target, ignore, class_weights),
        "dice": lambda: dice(logits, target, ignore),
        "lovasz": lambda: lovasz_softmax(logits, target, ignore),
    }
    counted = {name: weight for name, weight in asdict(weights).items() if weight > 0}
    parts = {name: losses[name]() for name in counted}
    total = torch.stack([weight * parts[name] for name, weight in counted.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def inverse_log_weights(pixel_counts: Float[Tensor, "K"], offset: float = 1.1) -> Float[Tensor, "K"]:
    """Class weights 1 / ln(offset + share of pixels) (ENet, Paszke et al. 2016, section 5.2, with c = offset)."""
    return 1 / torch.log(offset + pixel_counts / pixel_counts.sum())
