"""No pixel decoder: for heads that take the maps of the backbone as they are."""

from torch import Tensor, nn

from denselab.types import FeatureSpec


class PassThrough(nn.Module):
    """The maps of the backbone, unchanged."""

    def __init__(self, inputs: tuple[FeatureSpec, ...]) -> None:
        super().__init__()
        self.features = inputs

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return maps
