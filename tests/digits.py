"""A small ViT that has learned to read handwritten digits, for tests of what is left of it at few bits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab import _vision as _vision

# isort: split
import timm
from sklearn.datasets import load_digits

from compress_models import captured
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph

_SIDE_PX = 32
_WIDTH = 48
_TRAINING = 1300
_CALIBRATION = 64
_EPOCHS = 6
_RATE = 5e-3


@dataclass(frozen=True, eq=False)
class Reader:
    """A trained network that nobody changes. right: its share of right answers, before `_spread`.

    seen: to calibrate with. test, digits: which it has not learned from.
    """

    graph: Graph
    right: float
    seen: Tensor
    test: Tensor
    digits: Tensor

    def top1(self, network: Callable[[Tensor], Tensor]) -> float:
        """The share of the test images that a network reads right."""
        return _top1(network, self.test, self.digits)


@cache
def reader() -> Reader:
    """timm's ViT, narrow, trained in a second and captured once for all tests."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float().div(16)[:, None].expand(-1, 3, -1, -1)
    pixels, digits = (F.interpolate(pixels, _SIDE_PX) - 0.3) / 0.4, torch.from_numpy(data.target)  # standardised
    test, wanted = pixels[_TRAINING:], digits[_TRAINING:]
    model = _trained(_untrained(), pixels[:_TRAINING], digits[:_TRAINING])
    right = _top1(model, test, wanted)
    _spread(model)
    return Reader(fold_norms(captured(model, side_px=_SIDE_PX)), right, pixels[:_CALIBRATION], test, wanted)


def _top1(network: Callable[[Tensor], Tensor], test: Tensor, digits: Tensor) -> float:
    with torch.no_grad():
        return (network(test).argmax(1) == digits).double().mean().item()


def _untrained() -> nn.Module:
    """It starts from larger weights than timm's, from which it learns in seconds."""
    torch.manual_seed(0)
    sizes = {"embed_dim": _WIDTH, "depth": 2, "num_heads": 3, "img_size": _SIDE_PX, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    nn.init.normal_(model.pos_embed, std=0.5)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return model


def _trained(model: nn.Module, pixels: Tensor, digits: Tensor) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_EPOCHS * (len(pixels) // 64))
    model.train()
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(pixels), generator=generator).split(64)[: len(pixels) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[batch]), digits[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _spread(model: nn.Module) -> None:
    """Make the channels of norms differ as those of large trained models do; the answers stay the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.get_submodule("blocks").children():
            for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
                factors = 10 ** (torch.rand(_WIDTH, generator=generator) - 0.5)
                for name in ("weight", "bias"):
                    block.get_parameter(f"{norm}.{name}").mul_(factors)
                block.get_parameter(f"{layer}.weight").div_(factors)
