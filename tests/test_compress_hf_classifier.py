"""denselab compress of image classifiers that transformers saved: their own pixels and logits, end to end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from denselab import _vision as _vision

# isort: split
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    EfficientNetImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from denselab.cli.compress import compress
from denselab.compress.classifier_file import CLASSIFIER_KEY
from denselab.compress.subject import Classifier, hub_classifier_subject
from denselab.errors import InputError
from denselab.hub.image_classifier import image_classifier, is_image_classifier
from denselab.runtime.session import open_session
from tiny_classifier import NAMES, photo, write_photos

pytestmark = pytest.mark.usefixtures("one_thread", "one_registry")

SIDE_PX = 16
LABELS: dict[str, Any] = {"id2label": dict(enumerate(NAMES))}
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE_PX,
    "patch_size": 8,
    **LABELS,
}
SQUARE = {"height": SIDE_PX, "width": SIDE_PX}
MEAN_STD: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}

app = typer.Typer()
app.command()(compress)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def swin() -> Any:
    config = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return SwinForImageClassification(SwinConfig(**config, window_size=4, **LABELS))


def mobilevit() -> Any:
    config = {"image_size": 32, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8]}
    return MobileViTForImageClassification(MobileViTConfig(**config, num_attention_heads=2, **LABELS))


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "ViT, squashed": (
        lambda: ViTForImageClassification(ViTConfig(**TINY)),
        lambda: ViTImageProcessor(size=SQUARE, resample=3, **MEAN_STD),
    ),
    "DeiT with its teacher, resized and cropped": (
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY)),
        lambda: DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size=SQUARE, **MEAN_STD),
    ),
    "BEiT, scaled to [-1, 1]": (
        lambda: BeitForImageClassification(BeitConfig(**TINY, use_relative_position_bias=True)),
        lambda: BeitImageProcessor(
            size=SQUARE, do_center_crop=False, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
        ),
    ),
    "ConvNeXt, shortest edge and crop": (
        lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], image_size=32, **LABELS)
        ),
        lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    ),
    "Swin": (swin, lambda: ViTImageProcessor(size={"height": 32, "width": 32})),
    "DINOv2, shortest edge and crop": (
        lambda: Dinov2ForImageClassification(Dinov2Config(**TINY)),
        lambda: BitImageProcessor(size={"shortest_edge": 18}, crop_size=SQUARE, **MEAN_STD),
    ),
    "MobileViT, in blue, green, red": (
        mobilevit,
        lambda: MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    ),
}


def net_of(case: str) -> Any:
    """A network whose logits differ by enough to tell classes apart."""
    torch.manual_seed(0)
    net = CASES[case][0]().eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                weight.mul_(8 if "classifier" in name else 4)
    return net


def save(folder: Path, net: Any, processor: Any) -> Path:
    net.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(net: Any, processor: Any, photos: list[np.ndarray]) -> np.ndarray:
    """What transformers itself says of photos, with its own image processor."""
    return np.stack([net(**processor(Image.fromarray(each), return_tensors="pt")).logits[0].numpy() for each in photos])


def pictures(count: int, side_px: int = 40) -> list[np.ndarray]:
    """Photos that are not square."""
    return [
        np.asarray(Image.fromarray(photo(number % 4, number, side_px)).resize((side_px + 10, side_px)))
        for number in range(count)
    ]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pixels_and_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    net, processor = net_of(case), CASES[case][1]()
    save(tmp_path / "model", net, processor)
    assert is_image_classifier(tmp_path / "model")
    subject = hub_classifier_subject(image_classifier(tmp_path / "model"))
    assert isinstance(subject.kind, Classifier)
    assert (subject.name, subject.kind.classes, subject.kind.names) == ("model", len(NAMES), NAMES)
    for each in pictures(2):
        seen = subject.seen(each)
        assert seen.dtype == torch.uint8
        pixels = subject.pixels(seen[None])
        wanted = processor(Image.fromarray(each), return_tensors="pt")["pixel_values"]
        in_rgb = wanted.flip(1) if "MobileViT" in case else wanted
        torch.testing.assert_close(pixels, in_rgb, rtol=0, atol=1e-5)
        logits = subject.network(pixels)
        torch.testing.assert_close(logits, net(wanted).logits, rtol=1e-4, atol=1e-4)
        assert subject.start(logits).item() == logits.max().item()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hf") / "colours", net_of("ViT, squashed"), CASES["ViT, squashed"][1]())


def test_a_classifier_of_transformers_becomes_a_small_file(vit: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    at = ("--calibrate", tmp_path / "photos", "--images", 16, "--budget", "8bits", "--method", "minmax")
    result = run(
        f"hf:{vit}", *at, "-o", tmp_path / "small.onnx", "--data", tmp_path / "photos", "--json", tmp_path / "r"
    )
    assert result.exit_code == 0, result.output
    props = {each.key: each.value for each in onnx.load(tmp_path / "small.onnx").metadata_props}
    about = json.loads(props[CLASSIFIER_KEY])
    assert (about["name"], about["classes"]) == ("colours", list(NAMES))
    assert about["data"]["input_size"] == [3, SIDE_PX, SIDE_PX]
    assert about["data"]["image_processor"]["image_mean"] == MEAN_STD["image_mean"]
    net, processor = net_of("ViT, squashed"), CASES["ViT, squashed"][1]()
    session = open_session(tmp_path / "small.onnx", "onnxruntime")
    photos = pictures(16, SIDE_PX)
    wanted = theirs(net, processor, photos)
    resized = [
        np.asarray(Image.fromarray(each).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)) for each in photos
    ]
    got = np.stack([session.run(each)["logits"] for each in resized])
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)
    assert np.mean(got.argmax(1) == wanted.argmax(1)) > 0.9
    (score,) = json.loads((tmp_path / "r").read_text())["scores"]
    labels = [number // 4 for number in range(16)]
    every = [np.asarray(Image.open(each)) for each in sorted((tmp_path / "photos").rglob("*.png"))]
    assert score["before"] == pytest.approx(np.mean(theirs(net, processor, every).argmax(1) == labels))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        image_classifier(folder)
    return str(raised.value)


def test_classifiers_that_cannot_be_used(vit: Path, tmp_path: Path) -> None:
    widths = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
    net = SegformerForSemanticSegmentation(SegformerConfig(**widths, decoder_hidden_size=16))
    assert not is_image_classifier(save(tmp_path / "dense", net, None))
    with pytest.raises(InputError, match=r"/none: wanted a folder, or the name of a model on the hub"):
        is_image_classifier("/none")

    def prepared(**settings: Any) -> Path:
        folder = tmp_path / f"model {len(list(tmp_path.iterdir()))}"
        shutil.copytree(vit, folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    square = ViTImageProcessor(size=SQUARE).to_dict()
    edge = BitImageProcessor(size={"shortest_edge": 16}, do_center_crop=False).to_dict()
    assert "whose photos are all of one size, got 26x16 and 16x26; give it a height and a width" in refusal(
        prepared(**edge)
    )
    wide = prepared(**square | {"size": {"height": 24, "width": 24}})
    assert "a network that takes the photos of its image processor, 24x24 px; got: Input image size" in refusal(wide)
    twice = EfficientNetImageProcessor(size=SQUARE).to_dict()
    assert "resizes, crops, rescales and normalises, and no more, got EfficientNetImageProcessor" in refusal(
        prepared(**twice)
    )
    bare = Path(shutil.copytree(vit, tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    assert "bare: wanted the image processor (preprocessor_config.json)" in refusal(bare)
    lacking = save(tmp_path / "lacking", net_of("ViT, squashed").vit, ViTImageProcessor(size=SQUARE))
    config = json.loads((vit / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps(config))
    assert "wanted all weights of ViTForImageClassification, got none for classifier.bias" in refusal(lacking)


def test_numbered_classes_have_no_names(tmp_path: Path) -> None:
    config = ViTConfig(**{key: value for key, value in TINY.items() if key != "id2label"}, num_labels=3)
    save(tmp_path / "model", ViTForImageClassification(config), ViTImageProcessor(size=SQUARE))
    hub = image_classifier(tmp_path / "model")
    assert (hub.classes, hub.names, hub.licence) == (3, None, "unknown")
    config.num_labels = 1
    save(tmp_path / "one", ViTForImageClassification(config), ViTImageProcessor(size=SQUARE))
    assert "wanted a classifier of two classes or more, got 1" in refusal(tmp_path / "one")
