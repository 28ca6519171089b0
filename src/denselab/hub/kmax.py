"""denselab.from_kmax: a checkpoint of the public PyTorch kMaX-DeepLab (bytedance/kmax-deeplab) as one of our models.

All sizes (backbone, stages, layers, queries, classes) are read off the shapes of its tensors. The network computes
what the published one computes for an input of 32 n + 1 px, aligned corners included, for every n. Deviations:
inputs are padded to the next such size instead of to the square of training; the semantic branch, which serves
training only, is left aside; mask logits are brought to the grid of our other models before they are enlarged to the
photo (see `CornerGridHead`), where the published code enlarges them twice.

Source: kmax-deeplab@f5a3d9e kmax_model.py, modeling/ and configs/.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from denselab.backbones.corner_grid import CornerGridBackbone, at_cell_centres, corner_convnext, corner_resnet
from denselab.classes import Classes
from denselab.data.cityscapes import CLASSES as CITYSCAPES
from denselab.errors import InputError
from denselab.heads.kmax import KMaXHead
from denselab.hub.coco_names import COCO_NAMES, COCO_THINGS
from denselab.hub.kmax_weights import backbone_weights, head_weights, pixel_decoder_weights
from denselab.hub.parts import HubModel, thing_ids
from denselab.model import DensePredictor
from denselab.pixel_decoders.kmax import KMaXPixelDecoder, Mixing, Stage
from denselab.types import HeadSpec, QueryOutput

KNOWN_CLASSES = {
    len(COCO_NAMES): Classes.named(COCO_NAMES, range(COCO_THINGS)),
    len(CITYSCAPES): CITYSCAPES,
}
"""What that many classes are in the published models, in the order of their classifier."""

TRAIN_HW = {len(CITYSCAPES): (1025, 2049)}
"""Height and width in px that models of so many classes were trained at; all others at `USUAL_HW`."""
USUAL_HW = (1281, 1281)

_BACKBONE, _DECODER, _HEAD = "backbone.", "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."


class CornerGridHead(KMaXHead):
    """The head on maps whose cells lie on corners; its masks lie on the centres of cells, as all masks here do."""

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        output = super().forward(maps)
        aux = tuple(_centred(each, spec) for each, spec in zip(output.aux, self.spec.aux, strict=bool(output.aux)))
        final = _centred(output, self.spec)
        return QueryOutput(final.mask_logits, final.values, final.pixel_embed, aux)


def _centred(output: QueryOutput, spec: HeadSpec) -> QueryOutput:
    assert output.pixel_embed is not None
    embed = F.normalize(at_cell_centres(output.pixel_embed, spec.mask_stride), dim=1)
    return QueryOutput(at_cell_centres(output.mask_logits, spec.mask_stride), output.values, embed)


def from_kmax(source: str | Path, classes: Classes | str | Path | None = None) -> HubModel:
    """Load a checkpoint of the public PyTorch kMaX-DeepLab on ResNet or ConvNeXt: a .pth file, or a .pkl converted
    from TensorFlow. No code in the file is run.

    classes: what its classes are, or a file that says so (see `read_classes`). None: the file of the same name that
    ends in .yaml, if there is one; else 133 are COCO's and 19 are Cityscapes', and others get numbers for names.
    With things among them the task is panoptic, else semantic.
    Raises InputError: no such file, no such checkpoint, tensors that are missing or too many, another number of
    classes than the checkpoint's.
    """
    path = Path(source)
    published = _Published(path, read_published(path))
    published.check_names()
    named, note = _classes(path, classes, published.num_classes)
    tasks = ("panoptic", "semantic") if named.things else ("semantic",)
    train_hw = TRAIN_HW.get(len(named), USUAL_HW)
    return HubModel(published.build().eval(), str(path), tasks, named, False, train_hw, None, "unknown", note)


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names, on the CPU. Raises InputError."""
    if not path.is_file():
        raise InputError(
            f"{path}: wanted a checkpoint of kMaX-DeepLab (.pth or .pkl), got no such file; check the path"
        )
    try:
        contents: Any = _unpickled(path) if path.suffix == ".pkl" else _torch_loaded(path)
    except Exception as error:  # a file that is something else fails in a dozen ways
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: wanted a checkpoint of kMaX-DeepLab, got a file with other things than tensors: {reason}; "
            "take it as published, .pth from PyTorch or .pkl converted from TensorFlow"
        ) from error
    tensors = contents.get("model", contents) if isinstance(contents, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor | np.ndarray) for t in tensors.values()):
        raise InputError(f'{path}: wanted a checkpoint of kMaX-DeepLab, tensors by name under "model", got none')
    return {str(name): torch.as_tensor(value) for name, value in tensors.items()}


def _torch_loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


_reconstruct: Any = np.zeros(1).__reduce_ex__(4)[0]
_frombuffer: Any = np.zeros(1).__reduce_ex__(5)[0]
_ARRAY_MAKERS = {"_reconstruct": _reconstruct, "_frombuffer": _frombuffer}
_OTHER_PARTS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): str.encode}


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays in plain containers, and refuses everything else before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        """What arrays are made by. numpy's own modules have had two names."""
        if module.startswith(("numpy.core.", "numpy._core.")) and name in _ARRAY_MAKERS:
            return _ARRAY_MAKERS[name]
        if (module, name) not in _OTHER_PARTS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _OTHER_PARTS[module, name]


def _unpickled(path: Path) -> Any:
    return _ArraysOnly(io.BytesIO(path.read_bytes())).load()


@dataclass(frozen=True)
class _Published:
    """The tensors of a checkpoint, and the sizes that their shapes tell."""

    path: Path
    tensors: Mapping[str, Tensor]

    def check_names(self) -> None:
        """Raise InputError where there are tensors of other parts than the three of the model."""
        strange = [name for name in self.tensors if not name.startswith((_BACKBONE, _DECODER, _HEAD))]
        if strange:
            raise InputError(
                f"{self.path}: wanted tensors of kMaX-DeepLab alone ({_BACKBONE}*, {_DECODER}*, {_HEAD}*), got "
                f"{strange[0]}{f' and {len(strange) - 1} more' if strange[1:] else ''}; is it of another model?"
            )

    def build(self) -> DensePredictor:
        """The model of these sizes with these weights."""
        backbone = self.backbone()
        decoder = self.pixel_decoder(backbone)
        head = self.head(decoder)
        try:
            backbone.load_state_dict(backbone_weights(self.tensors, backbone))
            decoder.load_state_dict(pixel_decoder_weights(self.tensors, decoder))
            head.load_state_dict(head_weights(self.tensors, head))
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        return DensePredictor(backbone, decoder, head)

    @property
    def num_classes(self) -> int:
        """Without "no object"."""
        return self.size(f"{_HEAD}_predcitor._transformer_class_head.conv.weight") - 1

    def backbone(self) -> CornerGridBackbone:
        """ResNet or ConvNeXt."""
        if f"{_BACKBONE}stem.conv1.weight" in self.tensors:
            stages = [f"{_BACKBONE}res{stage}." for stage in range(2, 6)]
            widths = tuple(self.size(f"{stage}0.conv1.weight") for stage in stages)
            return corner_resnet(tuple(map(self.count, stages)), widths)
        depths = tuple(self.count(f"{_BACKBONE}stages.{stage}.") for stage in range(4))
        widths = tuple(self.size(f"{_BACKBONE}stages.{stage}.0.dwconv.weight") for stage in range(4))
        return corner_convnext(depths, widths)

    def pixel_decoder(self, backbone: CornerGridBackbone) -> KMaXPixelDecoder:
        """Its stages, coarsest first."""
        stages: list[Stage] = []
        for place in range(self.count(f"{_DECODER}_stages.")):
            blocks = f"{_DECODER}_stages.{place}._blocks."
            axial = self.count(f"{blocks}0._attention.") > 0
            width = self.size(f"{blocks}0._conv3_bn.conv.weight") // 4
            stages.append(Stage(width, self.count(blocks), Mixing.AXIAL if axial else Mixing.BOTTLENECK))
        similarities = self.size(f"{_DECODER}_stages.0._blocks.0._attention._height_axis._batch_norm_similarity.weight")
        return KMaXPixelDecoder(backbone.features, tuple(stages), similarities // 3, align_corners=True)

    def head(self, decoder: KMaXPixelDecoder) -> CornerGridHead:
        """Its layers are told apart by the channels of the map that they look at."""
        layers = f"{_HEAD}_kmax_transformer_layers."
        numbers = range(self.count(layers))
        channels = [self.size(f"{layers}{number}._pixel_conv1_bn_act.conv.weight", 1) for number in numbers]
        return CornerGridHead(
            decoder.features,
            self.num_classes,
            self.size(f"{_HEAD}_cluster_centers.weight", 1),
            tuple(channels.count(feature.channels) for feature in decoder.features[::-1]),
            width=self.size(f"{_HEAD}_cluster_centers.weight"),
            embed_width=self.size(f"{_HEAD}_predcitor._transformer_mask_head.conv.weight"),
            ffn_width=self.size(f"{layers}0._query_ffn_conv1_bn_act.conv.weight"),
            num_heads=self.size(f"{layers}0._query_self_attention._batch_norm_similarity.weight"),
            semantic_width=None,
        )

    def count(self, prefix: str) -> int:
        """How many parts, each with a name of its own, lie below a prefix."""
        below = (name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix))
        return len({name.partition(".")[0] for name in below})

    def size(self, name: str, axis: int = 0) -> int:
        """Of a tensor along an axis."""
        if name not in self.tensors:
            first = next(iter(self.tensors), "nothing")
            raise InputError(
                f"{self.path}: wanted a checkpoint of kMaX-DeepLab on ResNet or ConvNeXt, got one without {name} "
                f"(its first tensor: {first}); take a whole checkpoint of bytedance/kmax-deeplab"
            )
        return self.tensors[name].shape[axis]


def read_classes(path: Path) -> Classes:
    """Classes of a YAML or JSON file. Raises InputError.

    It holds `names: [...]` in the order of the classifier and `things: [...]`, some of the names or their places; or
    the categories of COCO panoptic, a list of `{name, isthing}` or an annotation file with such a list.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: wanted a file with the names of the classes, got: {error}; check it") from error
    categories = values.get("categories") if isinstance(values, Mapping) else values
    try:
        if isinstance(categories, list):
            things = [place for place, each in enumerate(categories) if each["isthing"]]
            return Classes.named([each["name"] for each in categories], things)
        names = tuple(str(name) for name in values["names"])
        return Classes.named(names, thing_ids(names, values.get("things", ())))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: wanted names: [...] and things: [...], or COCO's categories with name and isthing, "
            f"got {error!r}; write them so"
        ) from error


def _classes(path: Path, given: Classes | str | Path | None, count: int) -> tuple[Classes, str]:
    """Classes, and what a user should know about them."""
    beside = path.with_suffix(".yaml")
    if given is None and beside.is_file():
        given = beside
    if given is None and count in KNOWN_CLASSES:
        return KNOWN_CLASSES[count], ""
    if given is None:
        names = [str(number) for number in range(count)]
        note = (
            f"The file does not name its {count} classes: taken as semantic. Else write names: and things: to {beside}."
        )
        return Classes.named(names), note
    named = given if isinstance(given, Classes) else read_classes(Path(given))
    if len(named) != count:
        raise InputError(
            f"classes: wanted {count}, as the classifier of {path} has, got {len(named)}; "
            "name them all, in the order of training"
        )
    return named, ""
