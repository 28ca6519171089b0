"""Checkpoints of the public kMaX-DeepLab: names and shapes as its code has them, on networks of a few channels."""

import copy
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import denselab
from denselab import _vision as _vision
from denselab.backbones.corner_grid import at_cell_centres, corner_convnext, corner_resnet
from denselab.cli import app
from denselab.errors import InputError
from denselab.export.torch_session import load_predictor, open_model
from denselab.heads.kmax import KMaXHead
from denselab.hub.kmax import KNOWN_CLASSES, from_kmax, read_classes
from denselab.hub.kmax_weights import head_weights, pixel_decoder_weights
from denselab.pixel_decoders.kmax import KMaXPixelDecoder, Mixing, Stage
from denselab.results import PanopticMap, SemanticMap
from denselab.tasks.blend import at_source

# isort: split
from torchvision.models.resnet import Bottleneck, ResNet

State = dict[str, Tensor]
KINDS = ("resnet", "convnext")
WIDTHS = {"resnet": (8, 16, 32, 64), "convnext": (8, 16, 24, 40)}
DEPTHS = {"resnet": (1, 2, 1, 1), "convnext": (1, 1, 2, 1)}
CHANNELS = {"resnet": tuple(4 * width for width in WIDTHS["resnet"]), "convnext": WIDTHS["convnext"]}
STAGES, BLOCKS, LEVELS = (32, 16, 8, 4), (1, 1, 2, 1), (0, 0, 1, 2)
WIDTH, EMBED, FFN, HEADS, QUERIES = 32, 16, 48, 2, 6
TINY: dict[str, Any] = {"width": WIDTH, "embed_width": EMBED, "ffn_width": FFN, "num_heads": HEADS}


pytestmark = pytest.mark.usefixtures("one_thread")


class Published:
    """Names and shapes of the public code, written down from it, with random values of a useful size."""

    def __init__(self, kind: str, num_classes: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(7)
        {"resnet": self.resnet, "convnext": self.convnext}[kind](DEPTHS[kind], WIDTHS[kind])
        self.pixel_decoder("sem_seg_head.pixel_decoder.", CHANNELS[kind])
        self.head("sem_seg_head.predictor.", num_classes)

    def draw(self, name: str, *shape: int, mean: float = 0.0, std: float | None = None) -> None:
        std = (1 / math.prod(shape[1:])) ** 0.5 if std is None else std
        self.state[name] = mean + std * torch.randn(shape, generator=self.generator)

    def norm(self, name: str, channels: int, scale: float = 1.0) -> None:
        self.draw(f"{name}.weight", channels, mean=scale, std=0.1 * scale)
        self.draw(f"{name}.bias", channels, std=0.1)
        self.draw(f"{name}.running_mean", channels, std=0.1)
        self.state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=self.generator)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(150000)

    def layer_norm(self, name: str, channels: int) -> None:
        self.draw(f"{name}.weight", channels, mean=1, std=0.1)
        self.draw(f"{name}.bias", channels, std=0.1)

    def biased(self, name: str, *shape: int) -> None:
        self.draw(f"{name}.weight", *shape)
        self.draw(f"{name}.bias", shape[0], std=0.1)

    def conv_bn(self, name: str, *shape: int) -> None:
        """ConvBN of kmax_pixel_decoder.py."""
        self.draw(f"{name}.conv.weight", *shape)
        self.norm(f"{name}.norm", shape[0])

    def resnet(self, depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
        def conv(name: str, *shape: int) -> None:  # Conv2d of detectron2 holds its norm
            self.draw(f"backbone.{name}.weight", *shape)
            self.norm(f"backbone.{name}.norm", shape[0])

        conv("stem.conv1", 64, 3, 7, 7)
        inputs = 64
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=2):
            for block in range(depth):
                name = f"res{stage}.{block}"
                if block == 0:
                    conv(f"{name}.shortcut", 4 * width, inputs, 1, 1)
                conv(f"{name}.conv1", width, inputs, 1, 1)
                conv(f"{name}.conv2", width, width, 3, 3)
                conv(f"{name}.conv3", 4 * width, width, 1, 1)
                inputs = 4 * width

    def convnext(self, depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
        self.biased("backbone.downsample_layers.0.0", widths[0], 3, 4, 4)
        self.layer_norm("backbone.downsample_layers.0.1", widths[0])
        for stage in range(1, 4):
            self.layer_norm(f"backbone.downsample_layers.{stage}.0", widths[stage - 1])
            self.biased(f"backbone.downsample_layers.{stage}.1", widths[stage], widths[stage - 1], 2, 2)
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for block in range(depth):
                name = f"backbone.stages.{stage}.{block}"
                self.draw(f"{name}.gamma", width, std=0.5)
                self.biased(f"{name}.dwconv", width, 1, 7, 7)
                self.layer_norm(f"{name}.norm", width)
                self.biased(f"{name}.pwconv1", 4 * width, width)
                self.biased(f"{name}.pwconv2", width, 4 * width)

    def pixel_decoder(self, prefix: str, channels: tuple[int, ...]) -> None:
        for place, (width, source) in enumerate(zip(STAGES, channels[::-1], strict=True)):
            self.layer_norm(f"{prefix}_in_norms.{place}", source)
            inputs = source if place == 0 else width
            if place > 0:
                fuse = f"{prefix}_resized_fuses.{place - 1}"
                self.conv_bn(f"{fuse}._conv_bn_low", width, 4 * STAGES[place - 1], 1, 1)
                if source != width:
                    self.conv_bn(f"{fuse}._conv_bn_high", width, source, 1, 1)
            for block in range(BLOCKS[place]):
                name = f"{prefix}_stages.{place}._blocks.{block}"
                if inputs != 4 * width:
                    self.conv_bn(f"{name}._shortcut", 4 * width, inputs, 1, 1)
                if place < 2:
                    self.conv_bn(f"{name}._conv1_bn_act", 2 * width, inputs, 1, 1)
                    self.axis(f"{name}._attention._height_axis", 2 * width, width)
                    self.axis(f"{name}._attention._width_axis", 2 * width, width)
                    self.conv_bn(f"{name}._conv3_bn", 4 * width, 2 * width, 1, 1)
                else:
                    self.conv_bn(f"{name}._conv1_bn_act", width, inputs, 1, 1)
                    self.conv_bn(f"{name}._conv2_bn_act", width, width, 3, 3)
                    self.conv_bn(f"{name}._conv3_bn", 4 * width, width, 1, 1)
                inputs = 4 * width

    def axis(self, name: str, inputs: int, width: int) -> None:
        self.draw(f"{name}.qkv_transform.conv.weight", 4 * width, inputs, 1)
        for table, depth in (("query", width), ("key", width), ("value", 2 * width)):
            self.draw(f"{name}._{table}_rpe._embeddings.weight", 509, depth // HEADS, std=0.5)
        self.norm(f"{name}._batch_norm_qkv", 4 * width)
        self.norm(f"{name}._batch_norm_similarity", 3 * HEADS)
        self.norm(f"{name}._batch_norm_retrieved_output", 4 * width)

    def head(self, prefix: str, num_classes: int) -> None:
        for number, level in enumerate(LEVELS):
            layer = f"{prefix}_kmax_transformer_layers.{number}."
            self.conv_bn(f"{layer}_query_conv1_bn_act", WIDTH, WIDTH, 1)
            self.conv_bn(f"{layer}_pixel_conv1_bn_act", WIDTH, 4 * STAGES[level], 1, 1)
            self.conv_bn(f"{layer}_query_qkv_conv_bn", 2 * WIDTH, WIDTH, 1)
            self.conv_bn(f"{layer}_pixel_v_conv_bn", WIDTH, WIDTH, 1, 1)
            self.norm(f"{layer}_query_self_attention._batch_norm_similarity", HEADS)
            self.norm(f"{layer}_query_self_attention._batch_norm_retrieved_value", WIDTH)
            self.conv_bn(f"{layer}_query_conv3_bn", WIDTH, WIDTH, 1)
            self.conv_bn(f"{layer}_query_ffn_conv1_bn_act", FFN, WIDTH, 1)
            self.conv_bn(f"{layer}_query_ffn_conv2_bn", WIDTH, FFN, 1)
            self.predictor(f"{layer}_predcitor.", WIDTH, num_classes)
            self.norm(f"{layer}_kmeans_query_batch_norm_retrieved_value", WIDTH)
            self.conv_bn(f"{layer}_kmeans_query_conv3_bn", WIDTH, WIDTH, 1)
        self.draw(f"{prefix}_cluster_centers.weight", WIDTH, QUERIES, std=1)
        self.conv_bn(f"{prefix}_class_embedding_projection", WIDTH, WIDTH, 1)
        self.conv_bn(f"{prefix}_mask_embedding_projection", WIDTH, WIDTH, 1)
        self.predictor(f"{prefix}_predcitor.", 4 * STAGES[-1], num_classes)
        semantic = f"{prefix}_auxiliary_semantic_predictor."  # of use in training only; two of its many parts
        self.conv_bn(f"{semantic}_aspp._aspp_conv0", 256, 64, 1, 1)
        self.biased(f"{semantic}final_conv.conv", num_classes + 1, 256, 1, 1)

    def predictor(self, prefix: str, channels: int, num_classes: int) -> None:
        self.conv_bn(f"{prefix}_pixel_space_head_conv0bnact", channels, 1, 5, 5)
        self.conv_bn(f"{prefix}_pixel_space_head_conv1bnact", WIDTH, channels, 1, 1)
        self.conv_bn(f"{prefix}_pixel_space_head_last_convbn", EMBED, WIDTH, 1, 1)
        self.draw(f"{prefix}_pixel_space_head_last_convbn.conv.bias", EMBED, std=0.1)
        self.conv_bn(f"{prefix}_transformer_mask_head", EMBED, WIDTH, 1)
        self.biased(f"{prefix}_transformer_class_head.conv", num_classes + 1, WIDTH, 1)
        self.state[f"{prefix}_transformer_class_head.conv.bias"][-1] -= 6  # segments, rather than "no object"
        self.norm(f"{prefix}_pixel_space_mask_batch_norm", 1, scale=4)


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    """As detectron2 saves it."""
    torch.save({"model": dict(state), "optimizer": {"state": {}}, "iteration": 149999}, path)
    return path


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {kind: Published(kind, 133).state for kind in KINDS}


@pytest.fixture(scope="module")
def files(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {kind: save(folder / f"{kind}.pth", states[kind]) for kind in KINDS}


def photos(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))


# --- The backbones, computed from the published tensors alone, with TensorFlow's "same" padding at 32 n + 1 px ---


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad so that there are ceil(size / stride) windows; the odd one of the padding goes to the right and bottom."""
    total = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in total)
    return F.pad(x, (left, right, top, bottom))


def resnet(state: State, x: Tensor) -> tuple[Tensor, ...]:
    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, norm = state[f"backbone.{name}.weight"], f"backbone.{name}.norm."
        x = F.conv2d(same(x, weight.shape[-1], stride), weight, stride=stride)
        statistics = (state[f"{norm}running_mean"], state[f"{norm}running_var"])
        return F.batch_norm(x, *statistics, state[f"{norm}weight"], state[f"{norm}bias"], eps=1e-3)

    x = F.max_pool2d(same(conv("stem.conv1", x, 2).relu(), 3, 2), 3, 2)
    maps: list[Tensor] = []
    for stage, depth in enumerate(DEPTHS["resnet"], start=2):
        for block in range(depth):
            name, stride = f"res{stage}.{block}", 2 if block == 0 and stage > 2 else 1
            shortcut = conv(f"{name}.shortcut", x, stride) if block == 0 else x
            inner = conv(f"{name}.conv2", conv(f"{name}.conv1", x).relu(), stride).relu()
            x = (conv(f"{name}.conv3", inner) + shortcut).relu()
        maps.append(x)
    return tuple(maps)


def convnext(state: State, x: Tensor) -> tuple[Tensor, ...]:
    def of(name: str) -> tuple[Tensor, Tensor]:
        return state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], *of(name), eps=1e-6).movedim(-1, 1)

    maps: list[Tensor] = []
    for stage, depth in enumerate(DEPTHS["convnext"]):
        if stage == 0:
            x = norm("downsample_layers.0.1", F.conv2d(same(x, 4, 4), *of("downsample_layers.0.0"), stride=4))
        else:
            x = norm(f"downsample_layers.{stage}.0", same(x, 2, 2))
            x = F.conv2d(x, *of(f"downsample_layers.{stage}.1"), stride=2)
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            inner = norm(f"{name}.norm", F.conv2d(x, *of(f"{name}.dwconv"), padding=3, groups=x.shape[1]))
            inner = F.linear(F.gelu(F.linear(inner.movedim(1, -1), *of(f"{name}.pwconv1"))), *of(f"{name}.pwconv2"))
            x = x + (state[f"backbone.{name}.gamma"] * inner).movedim(-1, 1)
        maps.append(x)
    return tuple(maps)


BACKBONES: dict[str, Callable[[State, Tensor], tuple[Tensor, ...]]] = {"resnet": resnet, "convnext": convnext}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_backbones_compute_what_the_published_tensors_say(
    kind: str, states: dict[str, State], files: dict[str, Path]
) -> None:
    backbone = from_kmax(files[kind]).model.backbone
    for height, width in ((32, 64), (96, 32)):
        pixels = photos(height, width)
        maps = backbone(pixels)
        wanted = BACKBONES[kind](states[kind], F.pad(pixels, (0, 1, 0, 1)))
        for got, theirs, feature in zip(maps, wanted, backbone.features, strict=True):
            torch.testing.assert_close(got, theirs, atol=1e-4, rtol=1e-4)
            cells = (height // feature.stride + 1, width // feature.stride + 1)
            assert got.shape == (1, feature.channels, *cells)
            assert got.std() > 0.01
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


@torch.no_grad()
def test_resnet_is_torchvisions_with_another_eps() -> None:
    torch.manual_seed(0)
    ours = corner_resnet((1, 1, 1, 1), (64, 128, 256, 512)).eval()
    theirs = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=lambda width: nn.BatchNorm2d(width, eps=1e-3)).eval()
    theirs.load_state_dict(ours.net.state_dict(), strict=False)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(photos(65, 97)))))
    cropped = ours.net(photos(65, 97))
    for got, stage in zip(cropped, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
        x = stage(x)
        torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_convnext_is_timms_with_padding_by_hand() -> None:
    import timm

    torch.manual_seed(0)
    ours = corner_convnext((1, 1, 1, 1), (8, 16, 24, 32)).eval()
    theirs: Any = timm.create_model("convnext_tiny", features_only=True, depths=(1,) * 4, dims=(8, 16, 24, 32)).eval()
    theirs.load_state_dict(ours.net.state_dict())
    x = theirs.stem_1(theirs.stem_0(same(F.pad(photos(32, 64), (0, 1, 0, 1)), 4, 4)))
    for got, stage in zip(ours(photos(32, 64)), (theirs[f"stages_{index}"] for index in range(4)), strict=True):
        x = stage(x if stage is theirs.stages_0 else same(x, 2, 2))
        torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


# --- The whole network ---


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_network_is_its_parts(kind: str, states: dict[str, State], files: dict[str, Path]) -> None:
    """Backbone as above; pixel decoder and head as the golden fixtures prove them, on maps of odd sizes."""
    hub = from_kmax(files[kind])
    pixels = photos(96, 64)
    normalised = F.pad((pixels - 0.5) / 0.5, (0, 1, 0, 1))
    kinds = (Mixing.AXIAL, Mixing.AXIAL, Mixing.BOTTLENECK, Mixing.BOTTLENECK)
    stages = tuple(Stage(*each) for each in zip(STAGES, BLOCKS, kinds, strict=True))
    decoder = KMaXPixelDecoder(hub.model.backbone.features, stages, HEADS, align_corners=True).eval()
    decoder.load_state_dict(pixel_decoder_weights(states[kind], decoder))
    head = KMaXHead(decoder.features, 133, QUERIES, (2, 1, 1), **TINY, semantic_width=None).eval()
    head.load_state_dict(head_weights(states[kind], head))
    wanted = head(decoder(BACKBONES[kind](states[kind], normalised)))
    assert wanted.mask_logits.shape == (1, QUERIES, 25, 17)
    got = hub.model(pixels)
    torch.testing.assert_close(got.values, wanted.values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got.mask_logits, at_cell_centres(wanted.mask_logits, 4), atol=1e-3, rtol=1e-3)
    assert got.mask_logits.shape == (1, QUERIES, 24, 16)
    assert got.mask_logits.std() > 0.1
    assert wanted.values.std() > 0.1


@torch.no_grad()
def test_every_tensor_counts(states: dict[str, State], files: dict[str, Path]) -> None:
    """All but the semantic branch; and each arrives unchanged, in whatever shape."""
    for kind in KINDS:
        used = {name: t for name, t in states[kind].items() if "_auxiliary_semantic_predictor" not in name}
        ours = from_kmax(files[kind]).model.state_dict()
        assert len(ours) == len(used)
        assert sorted(t.double().sum().item() for t in ours.values()) == pytest.approx(
            sorted(t.double().sum().item() for t in used.values())
        )


@torch.no_grad()
def test_outputs_are_what_the_specs_announce(files: dict[str, Path]) -> None:
    """Odd and smallest sizes; in training the outputs of the layers too, in unit vectors."""
    model = copy.deepcopy(from_kmax(files["convnext"]).model)
    for height, width in ((1, 1), (33, 95)):
        output = model(photos(height, width))
        assert output.mask_logits.shape[-2:] == (8 * -(-height // 32), 8 * -(-width // 32))
        assert output.aux == ()
    output = model.train()(photos(64, 96).repeat(2, 1, 1, 1))
    for got, spec in zip((output, *output.aux), (model.spec, *model.spec.aux), strict=True):
        assert got.mask_logits.shape == (2, QUERIES, 64 // spec.mask_stride, 96 // spec.mask_stride)
        assert got.pixel_embed is not None
        torch.testing.assert_close(got.pixel_embed.norm(dim=1), torch.ones(2, *got.mask_logits.shape[-2:]))
    assert len(output.aux) == len(LEVELS)


def test_cell_centres_by_hand() -> None:
    """Corners on pixels 0, 4, 8; centres of cells between pixels 1 and 2, and 5 and 6: 3/8 on from a corner."""
    corners = torch.tensor([[0.0, 8.0, 16.0], [80.0, 88.0, 96.0]])[None, None]
    assert at_cell_centres(corners, 4).tolist() == [[[[33.0, 41.0]]]]  # 0.375 * 80 + 3, and 8 more


@pytest.mark.parametrize("stride", [4, 8])
def test_masks_stay_in_place(stride: int) -> None:
    """What rises evenly over the photo still does after cell centres and upsampling, but for the outermost px."""
    rows, columns = torch.arange(5.0) * stride, torch.arange(4.0) * stride
    corners = (2 * rows[:, None] + 3 * columns)[None, None]
    size_hw = (4 * stride, 3 * stride)
    source = at_source(at_cell_centres(corners, stride), stride, size_hw)
    wanted = 2 * torch.arange(size_hw[0])[:, None] + 3.0 * torch.arange(size_hw[1])
    inner = (..., slice(stride // 2, -stride // 2), slice(stride // 2, -stride // 2))
    torch.testing.assert_close(source[inner], wanted[None, None][inner], atol=1e-4, rtol=0)


# --- What it is for a user ---


def test_says_what_it_is(files: dict[str, Path], tmp_path: Path) -> None:
    hub = denselab.from_kmax(files["resnet"])
    assert hub.tasks == ("panoptic", "semantic")
    assert hub.classes is not None
    assert (len(hub.classes), hub.classes.things) == (133, tuple(range(80)))
    assert [hub.classes.names[place] for place in (0, 79, 80, 132)] == ["person", "toothbrush", "banner", "rug-merged"]
    assert (hub.train_hw, hub.network_hw, hub.note, hub.licence) == ((1281, 1281), None, "", "unknown")
    cityscapes = from_kmax(save(tmp_path / "city.pth", Published("resnet", 19).state))
    assert cityscapes.train_hw == (1025, 2049)
    assert cityscapes.classes is KNOWN_CLASSES[19]
    assert cityscapes.classes.names[cityscapes.classes.things[0]] == "person"


def test_other_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "own.pth", Published("convnext", 3).state)
    unnamed = from_kmax(path)
    assert unnamed.tasks == ("semantic",)
    assert unnamed.classes is not None
    assert unnamed.classes.names == ("0", "1", "2")
    assert re.search(r"does not name its 3 classes: .* write names: and things: to .*own\.yaml", unnamed.note)
    (tmp_path / "own.yaml").write_text("names: [sky, car, tree]\nthings: [car]\n")
    beside = from_kmax(path)
    assert (beside.tasks, beside.note) == (("panoptic", "semantic"), "")
    assert beside.classes is not None
    assert (beside.classes.names, beside.classes.things) == (("sky", "car", "tree"), (1,))
    categories = [{"id": 9, "name": "a", "isthing": 1}, {"id": 12, "name": "b", "isthing": 0}]
    coco = tmp_path / "coco.json"
    for content in (categories, {"categories": categories, "images": []}):
        coco.write_text(json.dumps(content))
        assert (read_classes(coco).names, read_classes(coco).things) == (("a", "b"), (0,))
    with pytest.raises(InputError, match=r"classes: wanted 3, as the classifier of .*own.pth has, got 2; name them"):
        from_kmax(path, coco)
    with pytest.raises(InputError, match=r"classes: wanted 3, .* got 133"):
        from_kmax(path, KNOWN_CLASSES[133])
    for content in ("3", "names: 3", "[a, b]", "things: [a]"):
        coco.write_text(content)
        with pytest.raises(InputError, match=r"coco.json: wanted names: \[...\] and things: .*; write them so"):
            read_classes(coco)
    coco.write_text("names: [a, b, c]\nthings: [d]")
    with pytest.raises(InputError, match=r"things: wanted names or ids of classes \(0..2\), got \['d'\]"):
        read_classes(coco)
    with pytest.raises(InputError, match=r"gone.yaml: wanted a file with the names of the classes"):
        read_classes(tmp_path / "gone.yaml")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_converted_from_tensorflow(
    protocol: int, states: dict[str, State], files: dict[str, Path], tmp_path: Path
) -> None:
    """The public converter pickles numpy arrays, and has no count of batches."""
    kept = {name: t.numpy() for name, t in states["convnext"].items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "converted.pkl"
    path.write_bytes(pickle.dumps({"model": kept, "__author__": "third_party"}, protocol))
    ours, wanted = from_kmax(path).model.state_dict(), from_kmax(files["convnext"]).model.state_dict()
    for name, tensor in wanted.items():
        assert name.endswith("num_batches_tracked") or torch.equal(ours[name], tensor)


class Harmful:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": Harmful()}}, tmp_path / "bad.pth")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": {"a": Harmful()}}))
    for name in ("bad.pth", "bad.pkl"):
        with pytest.raises(InputError, match=rf"{name}: wanted .* got a file with other things than tensors: "):
            from_kmax(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_files_that_are_something_else(states: dict[str, State], tmp_path: Path) -> None:
    path, whole = tmp_path / "model.pth", states["convnext"]
    with pytest.raises(InputError, match=r"model.pth: wanted a checkpoint of kMaX-DeepLab .* no such file; check"):
        from_kmax(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"model.pth: wanted .* other things than tensors: .*; take it as published"):
        from_kmax(path)
    for contents in ([1, 2], {"model": {"a": 1}}):
        torch.save(contents, path)
        with pytest.raises(InputError, match=r'tensors by name under "model", got none'):
            from_kmax(path)
    save(path, {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)})
    with pytest.raises(InputError, match=r"wanted tensors of kMaX-DeepLab alone .* got fc.weight and 1 more; is it of"):
        from_kmax(path)
    save(path, {"backbone.patch_embed.weight": torch.ones(1)})
    wanted = (
        r"got one without sem_seg_head.* \(its first tensor: backbone.patch_embed.weight\); take a whole checkpoint"
    )
    with pytest.raises(InputError, match=wanted):
        from_kmax(path)
    save(path, {name: t for name, t in whole.items() if not name.startswith("backbone.")})
    with pytest.raises(InputError, match=r"got one without backbone.stages.0.0.dwconv.weight"):
        from_kmax(path)
    for lost in ("backbone.stages.2.1.gamma", "sem_seg_head.predictor._predcitor._pixel_space_mask_batch_norm.bias"):
        save(path, {name: t for name, t in whole.items() if name != lost})
        with pytest.raises(InputError, match=r"model.pth: published weights: .* of the model is not in the weights"):
            from_kmax(path)
    save(path, whole | {"sem_seg_head.pixel_decoder._extra.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"but .*_extra.weight is not in the model; .* a whole checkpoint"):
        from_kmax(path)


# --- Everywhere a model is asked for ---


def test_predicts_at_any_size(files: dict[str, Path]) -> None:
    predictor = denselab.load(f"kmax:{files['resnet']}")
    result = predictor(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    assert isinstance(result, PanopticMap)
    assert result.ids.shape == (70, 90)
    assert predictor.info.size_multiple == 32
    assert open_model(f"kmax:{files['resnet']}").card.tasks == ("panoptic",)
    with pytest.raises(InputError, match=r"gone.pth: wanted a checkpoint of kMaX-DeepLab"):
        denselab.load("kmax:gone.pth")
    with pytest.raises(InputError, match=r"hf:NAME or kmax:FILE, got model.pth"):
        denselab.load("model.pth")


@torch.no_grad()
def test_traces_at_any_size(files: dict[str, Path]) -> None:
    """As an artifact needs; the engines themselves are compared whenever one is exported."""
    model = from_kmax(files["convnext"]).model
    dynamic = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    traced = torch.export.export(model, (photos(65, 97),), dynamic_shapes=dynamic, strict=False).module()
    got, wanted = traced(photos(40, 70)), model(photos(40, 70))
    torch.testing.assert_close(got.mask_logits, wanted.mask_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.values, wanted.values, atol=1e-4, rtol=1e-4)


def test_the_page_shows_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/hugging-face.md on a tiny file of the name of one that nobody can fetch here; exporting takes too long."""
    page = (Path(__file__).parents[1] / "docs" / "hugging-face.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    predict, export = (line.split()[2:] for line in block.splitlines())
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "kmax_r50.pth", Published("resnet", 133).state)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save("photos/one.png")
    done = CliRunner().invoke(app, predict)
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    assert export[:2] == ["export", "kmax:kmax_r50.pth"]


def test_semantic_where_nothing_is_a_thing(tmp_path: Path) -> None:
    path = save(tmp_path / "own.pth", Published("convnext", 3).state)
    result = load_predictor(f"kmax:{path}")(np.zeros((40, 50, 3), np.uint8))
    assert isinstance(result, SemanticMap)
