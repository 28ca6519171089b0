"""APHQ-ViT: blocks are reconstructed where the answer curves most, with weights rounded up or down and dropped noise.

Wu et al.: APHQ-ViT: Post-Training Quantization with Average Perturbation Hessian Based Reconstruction for Vision
Transformers, CVPR 2025, arXiv:2504.02508; GoatWu/APHQ-ViT@44a985d test_quant.py, utils/block_recon.py. MLPs learn to do
without the tails of GELU (section 3.3, `relu_mlp`). Every grid is uniform, and the start that of RepQ-ViT. Then the
squared error of every block is weighted by the average perturbation Hessian of the change of the answer (section 3.2);
weights are rounded by AdaRound, activation scales learned, and half of the activations, and of the numbers that enter
the block, stay float while learning (QDrop).

Deviations. The paper takes 20 000 steps of 32 images, rates of 4e-5 for scales and 1e-3
for rounding; here it is `STEPS`, at relative rates that suit them. The last layer has the loss of the others, where the
code takes the divergence of its classes; blocks imitate the network with ReLU, where the code's imitate that with GELU.
"""

from dataclasses import replace

from denselab.compress.adaround import AdaRound
from denselab.compress.graph import Graph
from denselab.compress.methods import min_max
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import QuantPlan, QuantSpec
from denselab.compress.reconstruct import Loss, Recipe, reconstruct
from denselab.compress.relu_mlp import reconstruct_relu_mlps
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite

STEPS = 100
"""Per block; the paper takes 20 000."""

MLP_STEPS, MLP_RATE = 200, 2e-3
"""Per MLP; the paper takes 20 000 at 4e-5."""

RECIPE = Recipe(Loss.HESSIAN, AdaRound(0.05), STEPS, scale_rate=0.01, drop=0.5)


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """Uniform everywhere: weights symmetric per output channel, activations affine per tensor."""
    return min_max.spec(site, bits)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Rebuild MLPs, fit as RepQ-ViT, then reconstruct.

    Raises InputError as `fitted`, for grids it cannot fit, and for no images.
    """
    plan.check(graph.site_list())
    rebuilt = reconstruct_relu_mlps(graph, calibration, MLP_STEPS, MLP_RATE)
    if rebuilt is not graph:
        # Other numbers at the same sites: files that were made for the graph stay valid.
        rebuilt = replace(rebuilt, model=graph.model)
        stats = observe(rebuilt, calibration.batches, fewest_images=1, seed=calibration.seed)
    return reconstruct(REPQ_VIT.quantize(rebuilt, stats, plan, calibration), calibration, RECIPE)


APHQ_VIT = Method("aphq-vit", spec, quantize)
