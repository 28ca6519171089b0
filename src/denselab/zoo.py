"""One function per model; each cites what it follows.

`backbone` is the name of any timm model, or "small" or "street" for a network of denselab.backbones.small. A plain
vision transformer gets the simple feature pyramid of ViTDet. `pretrained` loads the backbone's weights through timm.
`answers` says what the values of a head are; a mapping from task to answer gives every task a head of its own on one
backbone and pixel decoder. `width`: channels of decoder and head, 256 in the papers. `queries`: masks of a head.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never, cast

from denselab.backbones.from_timm import OutputStrideError, TimmBackbone
from denselab.backbones.plain_tokens import split_transformer
from denselab.backbones.pooled import PooledBackbone
from denselab.backbones.simple_pyramid import SimplePyramid
from denselab.backbones.small import SmallBackbone
from denselab.errors import InputError
from denselab.heads.centre_offset import CentreOffsetHead
from denselab.heads.eomt import EomtHead
from denselab.heads.full_conv import FullConvHead
from denselab.heads.kmax import KMaXHead
from denselab.heads.masked_attention import MaskedAttentionHead
from denselab.heads.ocr import OcrHead
from denselab.heads.per_pixel import PerPixelHead
from denselab.heads.polymax import PolyMaXHead
from denselab.heads.regression import RegressionHead
from denselab.heads.score_fusion import ScoreFusionHead
from denselab.heads.values import ClassValues, DepthValues, NormalValues, Values
from denselab.layers import Norm
from denselab.model import DensePredictor, JointPredictor, Model
from denselab.pixel_decoders.deeplabv3 import DeepLabV3Decoder
from denselab.pixel_decoders.deeplabv3plus import DeepLabV3PlusDecoder
from denselab.pixel_decoders.dpt import DptDecoder
from denselab.pixel_decoders.fcn import FcnDecoder
from denselab.pixel_decoders.kmax import PUBLISHED_STAGES, KMaXPixelDecoder
from denselab.pixel_decoders.linknet import LinkNetDecoder
from denselab.pixel_decoders.lraspp import LrAsppDecoder
from denselab.pixel_decoders.multi_scale_fpn import MultiScaleFpnDecoder
from denselab.pixel_decoders.panoptic_deeplab import PanopticDeepLabDecoder
from denselab.pixel_decoders.panoptic_fpn import PanopticFpnDecoder
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.pixel_decoders.segnet import SegNetDecoder
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.types import Backbone, FeatureSpec, Head, PixelDecoder

Answers = Values | Mapping[str, Values]
"""What a model says: one kind of value, or one for each of several tasks."""


def street(num_classes: int) -> DensePredictor:
    """The built-in model: plain residual blocks at strides 4, 8, 16 (dilated at 16) and a light top-down decoder."""
    backbone = _street_backbone()
    decoder = TopDownDecoder(backbone.features, width=64)
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, num_classes, dropout=0.1))


def street_objects(num_classes: int) -> DensePredictor:
    """The built-in network with Panoptic-DeepLab's head on its one map: fast to train from the weights of `street`."""
    backbone = _street_backbone()
    decoder = TopDownDecoder(backbone.features, width=64)
    return DensePredictor(backbone, decoder, CentreOffsetHead(decoder.features, num_classes))


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


def kmax(
    answers: Answers,
    backbone: str = "resnet50",
    pretrained: bool = False,
    width: int = 256,
    queries: int = 128,
    norm: str = "batch",
) -> Model:
    """kMaX-DeepLab: Yu et al. 2022, section 3, with the stages of its COCO configuration.

    Depth and normals get a PolyMaX head. norm: batch, or group for batches of few images.
    """
    maps = pyramid(backbone, pretrained)
    return _on_kmax_decoder(answers, maps, width, queries, norm, _kmax_head)


def polymax(
    answers: Answers,
    backbone: str = "resnet50",
    pretrained: bool = False,
    width: int = 256,
    queries: int = 128,
    norm: str = "batch",
) -> Model:
    """PolyMaX: Yang et al. 2024, section 3 (there with ConvNeXt-L). norm: batch, or group for batches of few images."""
    maps = pyramid(backbone, pretrained)
    return _on_kmax_decoder(answers, maps, width, queries, norm, PolyMaXHead)


def mask2former(
    num_classes: int, backbone: str = "resnet50", pretrained: bool = False, width: int = 256, queries: int = 100
) -> DensePredictor:
    """Mask2Former: Cheng et al. 2022, section 3, with an FPN in place of deformable attention."""
    maps = pyramid(backbone, pretrained)
    decoder = MultiScaleFpnDecoder(maps.features, width, width)
    head = MaskedAttentionHead(
        decoder.features, num_classes, queries, width=width, num_heads=_heads_of(width), feed_forward=8 * width
    )
    return DensePredictor(maps, decoder, head)


def eomt(
    num_classes: int, backbone: str = "vit_large_patch14_dinov2", pretrained: bool = False, queries: int = 200
) -> DensePredictor:
    """EoMT: Kerssies et al. 2025, section 3 (with ViT-L). backbone: a plain ViT of timm (vit_*, deit_*, eva02_*)."""
    maps, last_blocks, norm = split_transformer(backbone, pretrained)
    head = EomtHead(maps.features, last_blocks, norm, num_classes, queries, maps.rope)
    return DensePredictor(maps, PassThrough(maps.features), head)


def panoptic_deeplab(
    num_classes: int, backbone: str = "resnet50", pretrained: bool = False, width: int = 256
) -> DensePredictor:
    """Panoptic-DeepLab: Cheng et al. 2020, section 3, coarsest map at stride 16."""
    maps = dilated_pyramid(backbone, pretrained, (4, 8), None)
    decoder = PanopticDeepLabDecoder(maps.features, width, width // 2, aspp_width=width)
    return DensePredictor(maps, decoder, CentreOffsetHead(decoder.features, num_classes))


def dpt(answers: Answers, backbone: str = "vit_base_patch16_384", pretrained: bool = False, width: int = 256) -> Model:
    """DPT: Ranftl et al. 2021, section 3, on four blocks of a plain ViT, or a pyramid."""
    maps = evenly_spread(backbone, pretrained)
    decoder = DptDecoder(maps.features, width)
    return assemble(maps, decoder, answers, functools.partial(_per_pixel_head, decoder.features))


def ocr(num_classes: int, backbone: str = "hrnet_w18", pretrained: bool = False, width: int = 512) -> DensePredictor:
    """OCR: Yuan et al. 2020, section 3 (there also with HRNet-W48); a semantic FPN joins the maps."""
    maps = pyramid(backbone, pretrained)
    decoder = PanopticFpnDecoder(maps.features)
    return DensePredictor(maps, decoder, OcrHead(decoder.features, num_classes, width))


def assemble(backbone: Backbone, decoder: PixelDecoder, answers: Answers, make_head: Callable[[Values], Head]) -> Model:
    """A model with one head, or with one per task."""
    if isinstance(answers, Mapping):
        return JointPredictor(backbone, decoder, {task: make_head(values) for task, values in answers.items()})
    return DensePredictor(backbone, decoder, make_head(answers))


def _on_kmax_decoder(
    answers: Answers, maps: Backbone, width: int, queries: int, norm: str, head: Callable[..., Head]
) -> Model:
    if norm not in (each.value for each in Norm):
        raise InputError(f"norm: wanted {' or '.join(each.value for each in Norm)}, got {norm!r}")
    published = [PUBLISHED_STAGES[f.stride] for f in maps.features[::-1] if f.stride in PUBLISHED_STAGES]
    stages = tuple(replace(stage, width=stage.width * width // 256) for stage in published)
    decoder = KMaXPixelDecoder(maps.features, stages, _heads_of(width), norm=Norm(norm))
    sizes: dict[str, Any] = {"width": width, "embed_width": width // 2, "ffn_width": 8 * width}

    def make_head(values: Values) -> Head:
        return head(decoder.features, values, num_queries=queries, num_heads=_heads_of(width), norm=Norm(norm), **sizes)

    return assemble(maps, decoder, answers, make_head)


def _kmax_head(inputs: tuple[FeatureSpec, ...], values: Values, **options: Any) -> Head:
    match values:
        case ClassValues(num_classes):
            return KMaXHead(inputs, num_classes, semantic_width=options["width"], **options)
        case DepthValues() | NormalValues():
            return PolyMaXHead(inputs, values, **options)
        case _:
            assert_never(values)


def _per_pixel_head(inputs: tuple[FeatureSpec, ...], values: Values) -> Head:
    match values:
        case ClassValues(num_classes):
            return PerPixelHead(inputs, num_classes)
        case DepthValues() | NormalValues():
            return RegressionHead(inputs, values)
        case _:
            assert_never(values)


def _heads_of(width: int) -> int:
    """Attention heads for that width: 8 as published, fewer where they would have less than 16 channels."""
    return max(1, min(8, width // 16))


@dataclass(frozen=True)
class Entry:
    """A model of the zoo, and the tasks that it serves."""

    make: Callable[..., Model]
    tasks: tuple[str, ...] = ("semantic",)

    @property
    def joint(self) -> bool:
        """Whether it serves several of its tasks at once."""
        return "answers" in inspect.signature(self.make).parameters


_SEGMENTS = ("semantic", "instance", "panoptic")
MODELS: dict[str, Entry] = {
    **{
        function.__name__: Entry(function)
        for function in (street, small, fpn, deeplabv3, deeplabv3plus, lraspp, segnet, linknet, fcn32s, fcn16s, fcn8s)
    },
    "ocr": Entry(ocr),
    "dpt": Entry(dpt, ("semantic", "depth", "normals")),
    "polymax": Entry(polymax, ("semantic", "depth", "normals")),
    "kmax": Entry(kmax, (*_SEGMENTS, "depth", "normals")),
    "mask2former": Entry(mask2former, _SEGMENTS),
    "eomt": Entry(eomt, _SEGMENTS),
    "panoptic_deeplab": Entry(panoptic_deeplab, _SEGMENTS),
    "street_objects": Entry(street_objects, _SEGMENTS),
}


def build(
    model: str,
    tasks: Sequence[str] = ("semantic",),
    num_classes: int = 2,
    choices: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> Model:
    """The model of that name for these tasks; choices (backbone, width, ...) that are left out are its own defaults.

    Raises InputError: unknown model, a task or choice that the model does not have, a backbone that does not fit.
    """
    if model not in MODELS:
        close = difflib.get_close_matches(model, MODELS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"model: wanted one of {', '.join(MODELS)}, got {model!r}{hint}")
    entry = MODELS[model]
    _check_tasks(model, entry, tasks)
    given = {**(choices or {}), **({"pretrained": True} if pretrained else {})}
    max_depth_m = given.pop("max_depth", None)
    if max_depth_m is not None and "depth" not in tasks:
        raise InputError(f"max_depth: wanted only for depth, got {max_depth_m} for {'+'.join(tasks)}; leave it out")
    for name in given.keys() - inspect.signature(entry.make).parameters.keys():
        raise InputError(f"{name}: the model {model!r} has no such choice, got {given[name]!r}; leave it out")
    answers = {task: _values(task, num_classes, max_depth_m) for task in tasks}
    if len(answers) > 1:
        return entry.make(answers, **given)
    (values,) = answers.values()
    return entry.make(values if entry.joint else cast("ClassValues", values).num_classes, **given)


def _check_tasks(model: str, entry: Entry, tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in entry.tasks:
            able = ", ".join(name for name, other in MODELS.items() if task in other.tasks) or "none"
            raise InputError(
                f"task: the model {model!r} serves {', '.join(entry.tasks)}, got {task}; models for it: {able}"
            )
    if len(set(tasks)) != len(tasks) or not tasks:
        raise InputError(f"task: wanted one or more different tasks, got {'+'.join(tasks)}; name each once")
    if len(tasks) > 1 and not entry.joint:
        able = ", ".join(name for name, other in MODELS.items() if other.joint and set(tasks) <= set(other.tasks))
        raise InputError(
            f"task: the model {model!r} serves one task at a time, got {'+'.join(tasks)}; "
            f"models for several: {able or 'none for these'}"
        )


def _values(task: str, num_classes: int, max_depth_m: float | None) -> Values:
    match task:
        case "depth":
            return DepthValues() if max_depth_m is None else DepthValues(max_depth_m)
        case "normals":
            return NormalValues()
        case "instance":
            return ClassValues(num_classes + 1)  # and background
        case _:
            return ClassValues(num_classes)


def _street_backbone() -> SmallBackbone:
    return SmallBackbone((32, 64, 96, 160), ((1, 1), (1, 1, 1), (1, 2, 4, 4)))


_OWN: dict[str, Callable[[], SmallBackbone]] = {"small": SmallBackbone, "street": _street_backbone}


def pyramid(
    name: str,
    pretrained: bool,
    strides: tuple[int, ...] = (4, 8, 16, 32),
    finest_stride: int = 4,
    output_stride: int | None = None,
) -> Backbone:
    """The backbone of that name, with all its maps from finest_stride on; `strides` of a plain transformer's."""
    if name in _OWN:
        if pretrained:
            raise InputError(f"pretrained: the backbone {name!r} has no pretrained weights; leave it out")
        backbone = _OWN[name]()
        if output_stride not in (None, backbone.features[-1].stride):
            raise InputError(f"output_stride: the backbone {name!r} has 16, got {output_stride}; leave it out")
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


def evenly_spread(name: str, pretrained: bool, count: int = 4) -> Backbone:
    """The backbone of that name; of a plain transformer the maps of `count` blocks, evenly spread up to the last."""
    if name in _OWN:
        return pyramid(name, pretrained)
    backbone = TimmBackbone(name, pretrained)
    if not backbone.plain:
        return backbone
    blocks = len(backbone.net.feature_info.reduction())
    indices = tuple(blocks * (place + 1) // count - 1 for place in range(count))
    return TimmBackbone(name, pretrained, out_indices=indices)
