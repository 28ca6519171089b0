"""How the change of the output curves with each element of a site: APHQ-ViT's average perturbation Hessian.

Wu et al.: APHQ-ViT, CVPR 2025; GoatWu/APHQ-ViT@44a985d utils/block_recon.py. With L the change of the output against
the unperturbed one, whose gradient is zero there, and J(x) its gradient at the site,

    H = mean over images of |J(x + h) - J(x - h)| / 2h,    all elements moved by h at once,

which is the magnitude of the sums of the rows of the Hessian, in place of its diagonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from denselab.compress.graph import Graph
from denselab.compress.relevance.scores import Batches, RunningMeans, single_images
from denselab.compress.relevance.sensitivity import Change
from denselab.errors import InputError


def perturbation_hessian(
    graph: Graph, batches: Batches, keys: Sequence[str], change: Change, step: float = 1e-3
) -> dict[str, Tensor]:
    """H of each site by its key, in the shape of one image's site.

    change: the paper's is `kl_change` at temperature 20. step: h. Deviations: the paper's h is 1e-6, which in float32
    leaves mostly rounding (values of about 1 have steps of 1e-7); it leaves out the division by 2h and divides by the
    mean of H, which changes no minimum.
    Raises InputError for no images, unknown keys, and NaN or infinity, naming the site.
    """
    means = RunningMeans()
    for pixels in single_images(graph, batches):
        with torch.no_grad():
            wanted = graph.run(pixels)
        hessians: dict[str, Tensor] = {}
        for key in keys:
            above, below = (_gradient(graph, pixels, key, moved, change, wanted) for moved in (step, -step))
            hessians[key] = (above - below).abs() / (2 * step)
            if not hessians[key].isfinite().all():
                raise InputError(f"Hessian: wanted finite numbers, got NaN or infinity at the site {key!r}")
        means.add(hessians)
    return means.compute()


def _gradient(graph: Graph, pixels: Tensor, key: str, moved: float, change: Change, wanted: object) -> Tensor:
    """Of the change, at a site moved by a constant."""
    at: list[Tensor] = []

    def hook(x: Tensor) -> Tensor:
        at.append((x.detach() + moved).requires_grad_())
        return at[-1]

    with torch.enable_grad():
        changed = change(graph.run(pixels, hooks={key: hook}), wanted).sum()
        return torch.autograd.grad(changed, at, allow_unused=True, materialize_grads=True)[0]
