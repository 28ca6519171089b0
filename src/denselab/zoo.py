"""One function per model; each cites what it follows.

`backbone` is the name of any timm model, or "small" for the network of denselab.backbones.small. A plain vision
transformer gets the simple feature pyramid of ViTDet. `pretrained` loads the backbone's weights through timm.
"""

import difflib
import inspect
from collections.abc import Callable

from denselab.backbones.from_timm import OutputStrideError, TimmBackbone
from denselab.backbones.pooled import PooledBackbone
from denselab.backbones.simple_pyramid import SimplePyramid
from denselab.backbones.small import SmallBackbone
from denselab.errors import InputError
from denselab.heads.full_conv import FullConvHead
from denselab.heads.per_pixel import PerPixelHead
from denselab.heads.score_fusion import ScoreFusionHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.deeplabv3 import DeepLabV3Decoder
from denselab.pixel_decoders.deeplabv3plus import DeepLabV3PlusDecoder
from denselab.pixel_decoders.fcn import FcnDecoder
from denselab.pixel_decoders.linknet import LinkNetDecoder
from denselab.pixel_decoders.lraspp import LrAsppDecoder
from denselab.pixel_decoders.panoptic_fpn import PanopticFpnDecoder
from denselab.pixel_decoders.segnet import SegNetDecoder
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.types import Backbone


def street(num_classes: int) -> DensePredictor:
    """The built-in model: plain residual blocks at strides 4, 8, 16 (dilated at 16) and a light top-down decoder."""
    backbone = SmallBackbone((32, 64, 96, 160), ((1, 1), (1, 1, 1), (1, 2, 4, 4)))
    decoder = TopDownDecoder(backbone.features, width=64)
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, num_classes, dropout=0.1))


def small(num_classes: int, backbone: str = "small", pretrained: bool = False) -> DensePredictor:
    """The smallest: 0.37 M parameters, for tests and first tries. Our own."""
    maps = pyramid(backbone, pretrained)
    decoder = TopDownDecoder(maps.features, width=32)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def fpn(num_classes: int, backbone: str = "resnet50", pretrained: bool = False) -> DensePredictor:
    """Semantic FPN: Kirillov et al. 2019 (Panoptic FPN), Table 1 (there with ResNet-101 and ResNeXt-101)."""
    maps = pyramid(backbone, pretrained)
    decoder = PanopticFpnDecoder(maps.features)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def deeplabv3(
    num_classes: int, backbone: str = "resnet50", pretrained: bool = False, output_stride: int | None = None
) -> DensePredictor:
    """DeepLabv3: Chen et al. 2017, Table 5 (ASPP with image pooling at output stride 16, without multi-grid).

    output_stride: 8, 16 or 32; None: 16 where the backbone can be dilated, else the backbone's own.
    """
    maps = dilated_pyramid(backbone, pretrained, (), output_stride)
    decoder = DeepLabV3Decoder(maps.features)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def deeplabv3plus(
    num_classes: int, backbone: str = "resnet101", pretrained: bool = False, output_stride: int | None = None
) -> DensePredictor:
    """DeepLabv3+: Chen et al. 2018, Table 3 (ResNet-101), with the separable convolutions of Table 5.

    output_stride: 8, 16 or 32; None: 16 where the backbone can be dilated, else the backbone's own.
    """
    maps = dilated_pyramid(backbone, pretrained, (4,), output_stride)
    decoder = DeepLabV3PlusDecoder(maps.features)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def lraspp(
    num_classes: int,
    backbone: str = "mobilenetv3_large_100",
    pretrained: bool = False,
    output_stride: int | None = None,
) -> DensePredictor:
    """MobileNetV3 with LR-ASPP: Howard et al. 2019, Table 7, row 5 (V3-Large, 128 filters, last block not halved)."""
    maps = dilated_pyramid(backbone, pretrained, (8,), output_stride)
    decoder = LrAsppDecoder(maps.features)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def segnet(num_classes: int, backbone: str = "vgg16_bn", pretrained: bool = False) -> DensePredictor:
    """SegNet: Badrinarayanan et al. 2017, Table 2 (60.1 mIoU on CamVid)."""
    maps = pyramid(backbone, pretrained, (1, 2, 4, 8, 16), finest_stride=1)
    decoder = SegNetDecoder(maps.features)
    return DensePredictor(maps, decoder, PerPixelHead(decoder.features, num_classes))


def linknet(num_classes: int, backbone: str = "resnet18", pretrained: bool = False) -> DensePredictor:
    """LinkNet: Chaurasia and Culurciello 2017, Fig. 1 and section IV."""
    maps = pyramid(backbone, pretrained)
    decoder = LinkNetDecoder(maps.features)
    return DensePredictor(maps, decoder, FullConvHead(decoder.features, num_classes))


def fcn32s(num_classes: int, backbone: str = "vgg16", pretrained: bool = False, width: int = 4096) -> DensePredictor:
    """FCN-32s: Long et al. 2015, Table 2. width: channels of fc6 and fc7; 4096 are 120 M parameters."""
    return _fcn(num_classes, backbone, pretrained, 32, width)


def fcn16s(num_classes: int, backbone: str = "vgg16", pretrained: bool = False, width: int = 4096) -> DensePredictor:
    """FCN-16s: Long et al. 2015, Table 2. width: channels of fc6 and fc7; 4096 are 120 M parameters."""
    return _fcn(num_classes, backbone, pretrained, 16, width)


def fcn8s(num_classes: int, backbone: str = "vgg16", pretrained: bool = False, width: int = 4096) -> DensePredictor:
    """FCN-8s: Long et al. 2015, Table 2. width: channels of fc6 and fc7; 4096 are 120 M parameters."""
    return _fcn(num_classes, backbone, pretrained, 8, width)


def _fcn(num_classes: int, backbone: str, pretrained: bool, finest_stride: int, width: int) -> DensePredictor:
    strides = tuple(stride for stride in (8, 16, 32) if stride >= finest_stride)
    maps = pyramid(backbone, pretrained, strides, finest_stride=1)
    if maps.features[0].stride == 1:
        maps = PooledBackbone(maps)
    decoder = FcnDecoder(maps.features, finest_stride, width)
    return DensePredictor(maps, decoder, ScoreFusionHead(decoder.features, num_classes))


MODELS: dict[str, Callable[..., DensePredictor]] = {
    function.__name__: function
    for function in (street, small, fpn, deeplabv3, deeplabv3plus, lraspp, segnet, linknet, fcn32s, fcn16s, fcn8s)
}


def build(
    model: str,
    backbone: str | None = None,
    num_classes: int = 2,
    pretrained: bool = False,
    output_stride: int | None = None,
) -> DensePredictor:
    """The model of that name; a choice that is None or False is the model's own default.

    Raises InputError: unknown model, a choice that the model does not have, a backbone that does not fit.
    """
    if model not in MODELS:
        close = difflib.get_close_matches(model, MODELS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"model: wanted one of {', '.join(MODELS)}, got {model!r}{hint}")
    function = MODELS[model]
    choices = {"backbone": backbone, "pretrained": pretrained or None, "output_stride": output_stride}
    given = {name: value for name, value in choices.items() if value is not None}
    for name in given.keys() - inspect.signature(function).parameters.keys():
        raise InputError(f"{name}: the model {model!r} has no such choice, got {given[name]!r}; leave it out")
    return function(num_classes, **given)


def pyramid(
    name: str,
    pretrained: bool,
    strides: tuple[int, ...] = (4, 8, 16, 32),
    finest_stride: int = 4,
    output_stride: int | None = None,
) -> Backbone:
    """The backbone of that name, with all its maps from finest_stride on; `strides` of a plain transformer's."""
    if name == "small":
        if pretrained:
            raise InputError("pretrained: the backbone 'small' has no pretrained weights; leave it out")
        backbone = SmallBackbone()
        if output_stride not in (None, backbone.features[-1].stride):
            raise InputError(f"output_stride: the backbone 'small' has 16, got {output_stride}; leave it out")
        return backbone
    backbone = TimmBackbone(name, pretrained, finest_stride, output_stride)
    return SimplePyramid(backbone, strides=strides) if backbone.plain else backbone


def dilated_pyramid(name: str, pretrained: bool, finer: tuple[int, ...], output_stride: int | None) -> Backbone:
    """A pyramid whose coarsest map has that stride; None: 16 where the backbone can be dilated, else its own."""
    strides = (*finer, output_stride or 16)
    try:
        return pyramid(name, pretrained, strides, output_stride=output_stride or 16)
    except OutputStrideError:
        if output_stride is not None:
            raise
        return pyramid(name, pretrained, strides)
