"""Models of the Hugging Face hub as ours: the same numbers, at any size, saved and built again."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from denselab import _vision as _vision

# isort: split
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    DPTImageProcessor,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
)

import denselab
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.export.torch_session import describe, open_model
from denselab.hub.dpt import LEAST_INVERSE_DEPTH
from denselab.hub.eomt import masked_blocks
from denselab.hub.hugging_face import from_hf
from denselab.hub.parts import HubModel
from denselab.hub.saved import pixel_statistics

LABELS = {"id2label": dict(enumerate(("sky", "road", "tree", "car", "person")))}
DINOV2 = Dinov2Config(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=56,
    out_indices=[1, 2, 3, 4],
    reshape_hidden_states=False,
)
NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "backbone_out_indices": [0, 1, 2, 3],
}
HYBRID: dict[str, Any] = {
    **VIT,
    **NECK,
    "neck_hidden_sizes": [32, 32, 8, 8],
    "is_hybrid": True,
    "backbone_featmap_shape": [1, 32, 4, 4],
    "backbone_config": {
        "model_type": "bit",
        "global_padding": "same",
        "layer_type": "bottleneck",
        "depths": [1, 1, 1],
        "hidden_sizes": [32, 32, 32],
        "embedding_size": 32,
        "num_groups": 4,
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    },
}


def segformer() -> Any:
    widths = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
    return SegformerForSemanticSegmentation(SegformerConfig(**widths, decoder_hidden_size=16, **LABELS))


def mask2former(**more: Any) -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2], image_size=64, drop_path_rate=0.0, out_features=stages
    )
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 64)  # two for each group of a norm
    inner = dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    config = Mask2FormerConfig(**({"backbone_config": swin} | widths | inner | layers | LABELS | more))
    return Mask2FormerForUniversalSegmentation._from_config(config, attn_implementation="eager")


def eomt(masked: float) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    net = EomtForUniversalSegmentation(EomtConfig(**sizes, num_blocks=2, num_queries=6, **LABELS))
    net.attn_mask_probs.fill_(masked)
    return net


def depth_anything(**more: Any) -> Any:
    config = DepthAnythingConfig(backbone_config=DINOV2, reassemble_hidden_size=16, head_hidden_size=8, **NECK, **more)
    return DepthAnythingForDepthEstimation(config)


NETS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "segformer": (segformer, lambda: SegformerImageProcessor(do_reduce_labels=True)),
    "dpt": (lambda: DPTForDepthEstimation(DPTConfig(**VIT, **NECK)), DPTImageProcessor),
    "dpt hybrid": (lambda: DPTForDepthEstimation(DPTConfig(**HYBRID)), DPTImageProcessor),
    "dpt semantic": (lambda: DPTForSemanticSegmentation(DPTConfig(**VIT, **NECK, **LABELS)), DPTImageProcessor),
    "dpt dinov2": (
        lambda: DPTForDepthEstimation(DPTConfig(backbone_config=DINOV2, hidden_size=16, **NECK)),
        DPTImageProcessor,
    ),
    "depth anything": (lambda: depth_anything(depth_estimation_type="metric", max_depth=20), DPTImageProcessor),
    "mask2former": (mask2former, Mask2FormerImageProcessor),
    "eomt": (lambda: eomt(masked=0), EomtImageProcessor),
    "eomt masked": (lambda: eomt(masked=1), EomtImageProcessor),
}
DPTS = ("dpt", "dpt hybrid", "dpt dinov2")


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def net_of(case: str) -> Any:
    """A network with opinions: weights of the size that keeps its signals alive."""
    generator = torch.Generator().manual_seed(1)
    net = NETS[case][0]().eval()
    with torch.no_grad():
        for name, weight in sorted(net.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
            if "queries_" in name or name == "class_predictor.weight":
                weight.mul_(8)  # queries that differ
            if name in ("head.head.4.bias", "head.conv3.bias"):
                weight.add_(1)  # depth that is not all cut off at zero
        if case == "mask2former":  # masks that differ, and every class gets some queries
            pixel_level = net.model.pixel_level_module
            project = pixel_level.decoder.mask_projection
            project.bias -= pixel_level(photos(1, 64, 96)).decoder_last_hidden_state.mean(dim=(0, 2, 3))
            project.weight *= 10
            project.bias *= 10
            net.class_predictor.bias -= net(photos(1, 64, 96)).class_queries_logits.mean(dim=(0, 1))
    return net


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, as transformers saves it."""

    @functools.cache
    def folder_of(case: str) -> Path:
        return save(tmp_path_factory.mktemp(case.replace(" ", "-")), net_of(case), NETS[case][1]())

    return folder_of


@pytest.fixture(scope="module")
def loaded(folders: Callable[[str], Path]) -> Callable[[str], HubModel]:
    @functools.cache
    def hub_of(case: str) -> HubModel:
        return from_hf(folders(case), metric_depth=True if case in DPTS else None)

    return hub_of


def save(folder: Path, net: Any, processor: Any) -> Path:
    net.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def theirs(case: str, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the network itself says of normalised pixels: mask logits, class logits."""
    net = net_of(case)
    said = net(pixels)
    if "masks_queries_logits" in said:
        return said.masks_queries_logits, said.class_queries_logits
    return (said.logits if "logits" in said else said.predicted_depth[:, None]), None


def photos(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


# transformers' EoMT runs at its own size only, and its DPT at squares only.
SIZES = {case: [(64, 64), (61, 50), (97, 131), (1, 1)] for case in NETS}
SIZES |= {case: [(64, 64), (61, 50)] for case in ("eomt", "eomt masked", "dpt hybrid")}
SIZES |= {case: [(64, 64), (61, 50), (90, 77)] for case in ("dpt", "dpt semantic")}


@pytest.mark.parametrize("case", NETS)
@torch.no_grad()
def test_says_what_the_network_itself_says(case: str, loaded: Callable[[str], HubModel]) -> None:
    model = loaded(case).model
    for size_hw in SIZES[case]:
        output = model(photos(2, *size_hw))
        pixels = model.normalize(photos(2, *size_hw))
        masks, values = theirs(case, pixels)
        if case == "dpt dinov2":  # patches of 14 px under a decoder for patches of 16 px
            masks = torch.nn.functional.interpolate(masks, pixels.shape[-2:], mode="bilinear")
        torch.testing.assert_close(output.mask_logits, masks, atol=1e-5, rtol=1e-5)
        assert masks.std() > 0.01  # it has opinions
        if values is not None:
            torch.testing.assert_close(output.values, values, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(output.values, torch.eye(masks.shape[1]).expand(2, -1, -1))


@pytest.mark.parametrize("case", NETS)
@torch.no_grad()
def test_shapes_follow_the_spec_at_any_size(case: str, loaded: Callable[[str], HubModel]) -> None:
    model, spec = loaded(case).model, loaded(case).model.spec
    for size_hw in ((70, 131), (1, 1)):
        output = model(photos(1, *size_hw))
        padded = [-(-side // model.size_multiple) * model.size_multiple for side in size_hw]
        assert output.mask_logits.shape == (1, spec.num_queries, *(side // spec.mask_stride for side in padded))
        assert output.values.shape == (1, spec.num_queries, spec.value_dim)
        assert output.mask_logits.isfinite().all()
        assert output.aux == ()
        features = model.backbone(model.normalize(photos(1, *size_hw)))
        for feature, map_ in zip(model.backbone.features, features, strict=False):
            assert map_.shape == (1, feature.channels, *(side // feature.stride for side in padded))


@torch.no_grad()
def test_dpt_takes_any_aspect(loaded: Callable[[str], HubModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the grid that its neck takes for a square, transformers says the same."""
    net, model = net_of("dpt"), loaded("dpt").model
    neck = net.neck.forward
    monkeypatch.setattr(net.neck, "forward", lambda states, *_: neck(states, 6, 10))
    pixels = model.normalize(photos(1, 96, 160))
    masks, _ = theirs("dpt", pixels)
    torch.testing.assert_close(model(photos(1, 96, 160)).mask_logits, masks, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eomt_resizes_its_positions(loaded: Callable[[str], HubModel]) -> None:
    backbone: Any = loaded("eomt").model.backbone
    grid = backbone.embeddings.position_embeddings.weight.view(1, 4, 4, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone.positions(4, 4), grid)
    wanted = torch.nn.functional.interpolate(grid, size=(7, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(backbone.positions(7, 3), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_depth_anything_traces_at_any_size(loaded: Callable[[str], HubModel]) -> None:
    """transformers' own forward does not; see the notes of Dinov2Layers and DepthAnythingHead."""
    model = loaded("depth anything").model
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = torch.zeros(1, 3, 2 * model.size_multiple + 1, 3 * model.size_multiple + 1)
    traced = torch.export.export(model, (example,), dynamic_shapes=(any_size,), strict=False).module()
    image = photos(1, 97, 131)
    torch.testing.assert_close(traced(image).mask_logits, model(image).mask_logits, atol=1e-5, rtol=1e-5)
    assert loaded("depth anything").network_hw is None


class Said(torch.nn.Module):
    """What a model says, as a plain tuple."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixels)
        return output.mask_logits, output.values


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch warns about its own deprecations while it exports
def test_mask2former_says_the_same_in_both_engines_at_a_fixed_size(
    loaded: Callable[[str], HubModel], tmp_path: Path
) -> None:
    hub = loaded("mask2former")
    assert hub.network_hw == (800, 1067)
    said, image, path = Said(hub.model).eval(), photos(1, 61, 90), str(tmp_path / "model.onnx")
    torch.onnx.export(said, (image,), path, dynamo=True, optimize=False, opset_version=20, verbose=False)
    wanted = [each.numpy() for each in said(image)]
    by_onnxruntime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    by_openvino = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    name = by_onnxruntime.get_inputs()[0].name
    for got in (by_onnxruntime.run(None, {name: image.numpy()}), by_openvino({name: image.numpy()}).values()):
        for ours, engines in zip(wanted, got, strict=True):
            np.testing.assert_allclose(engines, ours, atol=2e-4, rtol=1e-4)
    assert wanted[0].std() > 1  # mask logits of some size


@pytest.mark.parametrize(("case", "layers"), [("mask2former", 1), ("eomt masked", 2)])
def test_training_supervises_every_layer(case: str, layers: int, loaded: Callable[[str], HubModel]) -> None:
    model = copy.deepcopy(loaded(case).model)
    output = model.train()(photos(1, 64, 64))
    assert len(output.aux) == len(model.spec.aux) == layers
    if case == "mask2former":
        said = net_of(case)(model.normalize(photos(1, 64, 64)), output_auxiliary_logits=True)
        for ours, other in zip(output.aux, said.auxiliary_logits, strict=True):
            torch.testing.assert_close(ours.mask_logits, other["masks_queries_logits"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.values, other["class_queries_logits"], atol=1e-5, rtol=1e-5)
    sum((each.mask_logits.mean() + each.values.mean() for each in output.aux), output.values.mean()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert next(iter(model.backbone.parameters())).grad is not None


@torch.no_grad()
def test_relative_depth_is_the_inverse_of_what_the_network_gives(folders: Callable[[str], Path]) -> None:
    hub = from_hf(folders("dpt"))
    assert hub.relative_depth
    assert "Align" in hub.note
    assert describe(open_model(f"hf:{folders('dpt')}"), "m").depth_unit is DepthUnit.RELATIVE
    assert describe(open_model(f"hf:{folders('depth anything')}"), "m").depth_unit is DepthUnit.METRES
    inverse, _ = theirs("dpt", hub.model.normalize(photos(1, 64, 64)))
    depth = hub.model(photos(1, 64, 64)).mask_logits
    torch.testing.assert_close(depth, 1 / inverse.clamp(min=LEAST_INVERSE_DEPTH), atol=1e-5, rtol=1e-3)
    assert depth.max() <= 1000
    far, near = inverse.flatten().argmin(), inverse.flatten().argmax()
    assert depth.flatten()[far] > depth.flatten()[near]


def test_depth_anything_says_itself_whether_it_is_metric(
    folders: Callable[[str], Path], loaded: Callable[[str], HubModel], tmp_path: Path
) -> None:
    assert not loaded("depth anything").relative_depth
    assert loaded("depth anything").note == ""
    save(tmp_path, depth_anything(depth_estimation_type="relative"), DPTImageProcessor())
    assert from_hf(tmp_path).relative_depth
    with pytest.raises(InputError, match=r"metric_depth: wanted what the model says itself .*relative"):
        from_hf(tmp_path, metric_depth=True)
    with pytest.raises(InputError, match="metric_depth: SegformerForSemanticSegmentation gives no depth"):
        from_hf(folders("segformer"), metric_depth=True)


def test_tells_what_it_loaded(folders: Callable[[str], Path], loaded: Callable[[str], HubModel]) -> None:
    hub = loaded("segformer")
    assert hub.tasks == ("semantic",)
    assert hub.classes is not None
    assert hub.classes.names == ("sky", "road", "tree", "car", "person")
    assert hub.train_hw == (512, 512)
    assert hub.licence == "unknown"
    assert "do_reduce_labels" in hub.note
    assert loaded("dpt").classes is None
    assert loaded("eomt").train_hw == (640, 640)
    assert denselab.from_hf is from_hf
    (folders("segformer") / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert from_hf(str(folders("segformer"))).licence == "apache-2.0"
    (folders("segformer") / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    assert from_hf(folders("segformer")).licence == "unknown"


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_normalises_as_the_processor_does(settings: dict[str, Any]) -> None:
    processor = SegformerImageProcessor(do_resize=False, **settings)
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(each)[:, None, None] for each in pixel_statistics(processor))
    got = (torch.tensor(image).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(got, wanted.float(), atol=1e-4, rtol=1e-5)


COCO = ("person", *(f"thing {i}" for i in range(1, 79)), "toothbrush", *(f"stuff {i}" for i in range(53)))


@pytest.mark.parametrize(
    ("names", "options", "tasks", "things"),
    [
        (COCO, {}, ("panoptic", "semantic"), tuple(range(80))),
        (COCO[:80], {}, ("instance",), tuple(range(80))),
        (COCO, {"task": "semantic"}, ("semantic",), ()),
        (("a", "b", "c"), {}, ("semantic",), ()),
        (("a", "b", "c"), {"things": ["c", 1]}, ("panoptic", "semantic"), (1, 2)),
        (("a", "b", "c"), {"things": [0, 1, 2]}, ("instance",), (0, 1, 2)),
        (("a", "b", "c"), {"task": "instance"}, ("instance",), (0, 1, 2)),
        (("a", "a", "c"), {"task": "panoptic", "things": ["c"]}, ("panoptic", "semantic"), (2,)),
    ],
)
def test_things(
    names: tuple[str, ...],
    options: dict[str, Any],
    tasks: tuple[str, ...],
    things: tuple[int, ...],
    folders: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    net = mask2former(id2label=dict(enumerate(names)))
    hub = from_hf(save(tmp_path, net, Mask2FormerImageProcessor()), **options)
    assert hub.tasks == tasks
    assert hub.classes is not None
    assert hub.classes.things == things
    assert hub.model.spec.value_dim == len(names) + 1
    assert bool(hub.note) == (names[0] == "a" and not options)
    if names[1] == "a":
        assert hub.classes.names == ("a", "a (1)", "c")


def test_options_that_do_not_fit(folders: Callable[[str], Path]) -> None:
    masks = folders("mask2former")
    with pytest.raises(InputError, match=r"things: wanted names or ids of classes \(0..4\), got \['boat', 9\]"):
        from_hf(masks, things=["boat", 9])
    with pytest.raises(InputError, match="things: panoptic needs the classes"):
        from_hf(masks, task="panoptic")
    with pytest.raises(InputError, match="task: wanted semantic, instance or panoptic, got 'depth'"):
        from_hf(masks, task="depth")
    with pytest.raises(InputError, match="task: SegformerForSemanticSegmentation wanted semantic, got 'panoptic'"):
        from_hf(folders("segformer"), task="panoptic")
    with pytest.raises(InputError, match="things: SegformerForSemanticSegmentation tells no objects apart"):
        from_hf(folders("segformer"), things=["car"])
    with pytest.raises(InputError, match=r"attn_mask_probs: wanted 0 or 1 for every block, got \[0.5, 0.5\]"):
        masked_blocks(eomt(masked=0.5))


def test_sources_that_cannot_be_loaded(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"/no/such/folder: wanted a folder, or the name of a model on the hub"):
        from_hf("/no/such/folder")
    with pytest.raises(InputError, match=r"gone: wanted a folder"):
        from_hf(tmp_path / "gone")
    with pytest.raises(InputError, match=r"wanted a configuration of transformers \(config.json\).*check the folder"):
        from_hf(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing: wanted a config.*no folder has that name.*hf auth login"):
        from_hf("nobody/nothing")

    config = net_of("segformer").config
    other = save(tmp_path / "other", SegformerForImageClassification(config), None)
    with pytest.raises(InputError, match=r"wanted one of Segformer.*Eomt.*got the architecture SegformerForImageC"):
        from_hf(other)
    bare = save(tmp_path / "bare", net_of("segformer"), None)
    with pytest.raises(InputError, match=r"bare: wanted the image processor \(preprocessor_config.json\)"):
        from_hf(bare)

    old = save(tmp_path / "old", net_of("segformer"), SegformerImageProcessor())
    (old / "model.safetensors").unlink()
    torch.save(net_of("segformer").state_dict(), old / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"old: wanted weights .* in safetensors \(model.safetensors\)"):
        from_hf(old)
    (old / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"old: wanted weights .* in safetensors"):
        from_hf(old)


def test_weights_that_are_missing_or_of_another_shape(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path, net_of("segformer"), SegformerImageProcessor())
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "classifier" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"got none for decode_head.classifier.bias, decode_head.classifier.weight"):
        from_hf(folder)
    cut = {name: weight[:3].clone() if "classifier" in name else weight for name, weight in weights.items()}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"wanted weights that fit the configuration"):
        from_hf(folder)


def test_depth_networks_on_other_backbones_are_refused(tmp_path: Path) -> None:
    swin = {"model_type": "swinv2", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "image_size": 64}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    sizes = {"neck_hidden_sizes": [8, 16, 32, 64], "fusion_hidden_size": 8}
    net = DPTForDepthEstimation(DPTConfig(backbone_config={**swin, **stages}, **sizes))
    save(tmp_path, net, DPTImageProcessor())
    with pytest.raises(InputError, match="wanted a depth network on dinov2, got one on swinv2"):
        from_hf(tmp_path)
