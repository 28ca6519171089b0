"""Export: the file says what torch says, its receipt is true, and a file that disagrees is never written."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

import denselab
from denselab.data.truth import Truth
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.export import artifact
from denselab.export.artifact import export_artifact
from denselab.export.examples import Examples, from_scenes
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import (
    LIMITS_OF_MIXED,
    Limits,
    Measured,
    Receipt,
    agreement,
    check,
    measure,
    open_engines,
)
from denselab.export.precision import Precision
from denselab.export.torch_session import TorchSession
from denselab.model import DensePredictor
from denselab.runtime.artifact import read_info
from denselab.runtime.session import OnnxRuntimeSession, OpenVinoSession, Session
from denselab.tasks.task import make_task
from tiny_models import CLASSES, PHOTOS, TASKS, photo, tiny_info, tiny_model

SIZES_HW = [(1, 1), (1, 50), (16, 16), (17, 33), (96, 128), (101, 67)]


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    return tiny_model()


@pytest.fixture(scope="module")
def exported(model: DensePredictor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Receipt]:
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    return path, export_artifact(model, TASKS, tiny_info(), path, PHOTOS)


@pytest.fixture(scope="module")
def traced(exported: tuple[Path, Receipt]) -> ModelProto:
    return onnx.load(exported[0])


@pytest.fixture
def quick(traced: ModelProto, monkeypatch: pytest.MonkeyPatch) -> ModelProto:
    """A copy of the traced model that exports of this test use instead of tracing anew."""
    copied = ModelProto()
    copied.CopyFrom(traced)
    monkeypatch.setattr(artifact, "to_onnx", lambda graph: copied)
    return copied


def tamper(onnx_model: ModelProto) -> None:
    """Move the classifier's bias: class 0 nearly everywhere."""
    bias = next(t for t in onnx_model.graph.initializer if t.name.endswith("head.classify.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.array([9, 0, 0], np.float32), bias.name))


@pytest.mark.parametrize("size_hw", SIZES_HW, ids=str)
def test_engines_label_as_torch_does_at_any_size(
    model: DensePredictor, exported: tuple[Path, Receipt], size_hw: tuple[int, int]
) -> None:
    image = photo(*size_hw)
    expected = TorchSession(ArtifactGraph(model, TASKS)).run(image)
    assert expected["class_ids"].shape == size_hw
    assert expected["class_ids"].dtype == np.uint8
    for session in (OnnxRuntimeSession(exported[0]), OpenVinoSession(exported[0], precision="f32")):
        got = session.run(image)
        assert got["class_ids"].dtype == np.uint8
        assert agreement("semantic", expected, got) >= 0.999, session.engine


def labels_of(session: Session) -> list[np.ndarray]:
    return [session.run(image)["class_ids"] for image in PHOTOS.images]


def test_the_test_model_uses_every_class(model: DensePredictor) -> None:
    ids = np.concatenate([ids.ravel() for ids in labels_of(TorchSession(ArtifactGraph(model, TASKS)))])
    assert np.bincount(ids).min() > 0.1 * ids.size


def test_the_receipt_is_true(model: DensePredictor, exported: tuple[Path, Receipt]) -> None:
    path, receipt = exported
    assert receipt.file_bytes == path.stat().st_size
    assert dict(read_info(path).receipt) == json.loads(json.dumps(receipt.to_dict()))
    expected = labels_of(TorchSession(ArtifactGraph(model, TASKS)))
    engines = open_engines(path, receipt.threads)
    for name, engine in engines.items():
        same = [(ours == theirs).mean() for ours, theirs in zip(expected, labels_of(engine), strict=True)]
        assert receipt.agreement[name] == pytest.approx(np.mean(same))
    assert receipt.latency_hw == (97, 129)
    assert receipt.latency_ms.keys() == {"torch", *engines}
    assert min(receipt.latency_ms.values()) > 0
    assert (receipt.images, receipt.image_source, receipt.score) == (3, "blobs", None)


def test_relative_depth_is_compared_but_not_scored(
    model: DensePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = replace(PHOTOS, truths=tuple(Truth(depth_m=np.ones((97, 129), np.float32)) for _ in PHOTOS.images))
    seen: list[object] = []

    def stop_measuring(draft: Path, reference: TorchSession, examples: Examples, *_: object) -> Measured:
        seen.append(examples.truths)
        raise InputError("seen")

    monkeypatch.setattr(artifact, "to_onnx", lambda graph: ModelProto())
    monkeypatch.setattr(artifact, "measure", stop_measuring)
    for unit in DepthUnit:
        info = replace(tiny_info(), tasks=("depth",), classes=None, depth_unit=unit)
        with pytest.raises(InputError, match="seen"):
            export_artifact(model, (make_task("depth", None),), info, tmp_path / "depth.onnx", photos)
    assert seen == [photos.truths, None]


def test_the_receipt_reads_as_a_table(exported: tuple[Path, Receipt]) -> None:
    text = exported[1].to_text()
    assert f"{exported[0].stat().st_size} bytes" in text
    assert "129x97" in text
    assert all(line in text for line in ("torch", "openvino ", "openvino in fp32", "onnxruntime"))


def test_the_file_holds_one_model_and_nothing_of_this_machine(exported: tuple[Path, Receipt]) -> None:
    contents = exported[0].read_bytes()
    loaded = onnx.load(exported[0])
    onnx.checker.check_model(loaded, full_check=True)
    assert [node.op_type for node in loaded.graph.node].count("BatchNormalization") == 0
    assert [entry.key for entry in loaded.metadata_props] == ["denselab"]
    assert str(Path(denselab.__file__).parent).encode() not in contents
    assert b"stack_trace" not in contents
    assert read_info(exported[0]).classes == CLASSES


def test_truths_give_a_score(model: DensePredictor, quick: ModelProto, tmp_path: Path) -> None:
    # Truth is what torch says, but for one photo that is all void: torch scores 1, void counts nowhere.
    ids = labels_of(TorchSession(ArtifactGraph(model, TASKS)))
    truths = tuple(map(Truth, (*ids[:2], np.full_like(ids[2], 255))))
    examples = Examples("blobs", PHOTOS.images, truths)
    receipt = export_artifact(
        model, TASKS, tiny_info(), tmp_path / "a.onnx", examples, limits=Limits(0.999, 0.97, 0.05)
    )
    assert receipt.score is not None
    assert receipt.score["torch"] == {"mIoU": 1}
    assert 0.99 < receipt.score["onnxruntime"]["mIoU"] <= 1


def test_a_file_that_disagrees_is_not_written(model: DensePredictor, quick: ModelProto, tmp_path: Path) -> None:
    tamper(quick)
    with pytest.raises(InputError, match=r"wanted the answers of torch on 97 % of pixels, got .* nothing was written"):
        export_artifact(model, TASKS, tiny_info(), tmp_path / "a.onnx", PHOTOS)
    assert list(tmp_path.iterdir()) == []


def test_a_good_file_survives_a_failed_export(model: DensePredictor, quick: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"good")
    tamper(quick)
    with pytest.raises(InputError, match="nothing was written"):
        export_artifact(model, TASKS, tiny_info(), path, PHOTOS, overwrite=True)
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_nothing(
    model: DensePredictor, quick: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent != tmp_path:
            return real(path, data)
        real(path, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"a\.onnx: cannot be written \(No space left on device\); choose another"):
        export_artifact(model, TASKS, tiny_info(), tmp_path / "a.onnx", PHOTOS)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_on_its_way_is_not_kept(
    model: DensePredictor, quick: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = artifact._write

    def write_tampered(onnx_model: ModelProto, *arguments: object) -> object:
        tamper(onnx_model)
        return write(onnx_model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(artifact, "_write", write_tampered)
    with pytest.raises(RuntimeError, match="what was written is not what was measured"):
        export_artifact(model, TASKS, tiny_info(), tmp_path / "a.onnx", PHOTOS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.bin", r"a\.bin: wanted a file name that ends in \.onnx"),
        ("missing/a.onnx", "wanted a place in a folder that exists, got .*missing; create that folder"),
        ("folder.onnx", r"folder\.onnx: wanted a file, got a folder"),
        ("there.onnx", r"there\.onnx: exists already; choose another name or give --overwrite"),
        ("there.onnx/a.onnx", "wanted a place in a folder that exists"),
    ],
)
def test_unsuitable_targets(model: DensePredictor, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "there.onnx").write_bytes(b"good")
    with pytest.raises(InputError, match=text):
        export_artifact(model, TASKS, tiny_info(), tmp_path / name, PHOTOS)
    assert (tmp_path / "there.onnx").read_bytes() == b"good"


def test_a_fixed_network_size_keeps_the_source_size(
    model: DensePredictor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = ArtifactGraph(model, TASKS, network_hw=(64, 96))
    (tmp_path / "fixed.onnx").write_bytes(to_onnx(graph).SerializeToString())
    assert capfd.readouterr() == ("", "")
    session = OnnxRuntimeSession(tmp_path / "fixed.onnx")
    for size_hw in ((1, 1), (64, 96), (131, 57)):
        image = photo(*size_hw)
        expected = TorchSession(graph).run(image)
        assert expected["class_ids"].shape == size_hw
        assert agreement("semantic", expected, session.run(image)) >= 0.999
    same_size = photo(64, 96)
    fixed, free = (TorchSession(each).run(same_size) for each in (graph, ArtifactGraph(model, TASKS)))
    np.testing.assert_array_equal(fixed["class_ids"], free["class_ids"])


class _Moody(nn.Module):
    """A network whose path depends on its data, which no trace can hold."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.net(maps) if maps[0].sum() > 0 else maps


def test_a_model_that_cannot_be_traced_is_an_error_of_one_line() -> None:
    model = tiny_model()
    model.pixel_decoder = _Moody(model.pixel_decoder)
    with pytest.raises(
        InputError, match=r"^this model cannot be exported to run at any size \(.*; give the one size.*$"
    ):
        to_onnx(ArtifactGraph(model, TASKS))


def test_agreement_of_depth_without_a_unit_is_that_of_its_inverse() -> None:
    # Inverses 0.001, 0.5 and 1: 1 % of their span is 0.00999.
    ours, theirs = np.array([1000.0, 2, 1]), np.array([100.0, 1 / 0.52, 1 / 1.005])
    answers = {"depth_m": ours}, {"depth_m": theirs}
    assert agreement("depth", *answers) == pytest.approx(1 / 3)
    assert agreement("depth", *answers, depth_unit=DepthUnit.RELATIVE) == pytest.approx(2 / 3)


def test_agreement_by_hand() -> None:
    ours, theirs = np.array([[0, 1], [2, 2]]), np.array([[0, 1], [2, 0]])
    for task, name in (("semantic", "class_ids"), ("panoptic", "panoptic_ids")):
        assert agreement(task, {name: ours}, {name: ours}) == 1
        assert agreement(task, {name: ours}, {name: theirs}) == 3 / 4
        with pytest.raises(InputError, match=r"answers in the shape \(1, 2\), wanted \(2, 2\)"):
            agreement(task, {name: ours}, {name: ours[:1]})
    depth = {"depth_m": np.array([[1.0, 10.0, 0.5]])}
    assert agreement("depth", depth, {"depth_m": np.array([[1.009, 10.2, 0.5]])}) == pytest.approx(2 / 3)
    up, tilted = np.zeros((3, 1, 2)), np.zeros((3, 1, 2))
    up[2] = tilted[2] = 1
    tilted[:, 0, 1] = (np.sin(np.radians(2)), 0, np.cos(np.radians(2)))
    assert agreement("normals", {"normals": up}, {"normals": tilted}) == 0.5


def test_depths_agree_within_1_percent_and_of_integers_within_5() -> None:
    wanted, got = {"depth_m": np.array([[10.0, 10.0, 10.0]])}, {"depth_m": np.array([[10.05, 10.4, 11.0]])}
    for limits, share in (
        (Limits.of(Precision.FP32), 1 / 3),
        (Limits.of(Precision.INT8), 2 / 3),
        (LIMITS_OF_MIXED, 2 / 3),
    ):
        assert agreement("depth", wanted, got, limits.close) == pytest.approx(share)


def test_agreement_of_instances_by_hand() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]], [[1, 1, 1, 1]]], np.uint8)
    ours = {
        "instance_masks": masks,
        "instance_classes": np.array([0, 1, 0]),
        "instance_scores": np.array([0.9, 0.4, 0.1]),
    }
    assert agreement("instance", ours, ours) == 1
    order = [1, 0, 2]  # two that changed places, as engines do where scores are close
    swapped = {name: values[order] for name, values in ours.items()}
    assert agreement("instance", ours, swapped) == 1
    smaller = {**ours, "instance_masks": masks * np.array([1, 0, 1, 1], np.uint8)}
    assert agreement("instance", ours, smaller) == (1 / 2 + 1) / 2
    other_class = {**ours, "instance_classes": np.array([0, 0, 0])}
    assert agreement("instance", ours, other_class) == 0.5
    unsure = {**ours, "instance_scores": np.zeros(3)}
    assert agreement("instance", unsure, ours) == 1


def measured(shares: dict[str, float], score: dict[str, float] | None = None, figure: str = "mIoU") -> Measured:
    scores = None if score is None else {engine: {figure: value} for engine, value in score.items()}
    return Measured(shares, scores, ("AbsRel",), {}, (1, 1), 1, 4, "blobs")


def test_limits_by_hand() -> None:
    limits = Limits(exact=0.999, default=0.97, score_drop=0.01)
    good = {"openvino": 0.97, "openvino in fp32": 0.999, "onnxruntime": 1.0}
    check(measured(good), limits)
    check(measured(good, {"torch": 0.6, "openvino": 0.5901, "openvino in fp32": 0.6, "onnxruntime": 0.7}), limits)
    with pytest.raises(InputError, match=r"in onnxruntime: wanted .* 99\.9 % of pixels, got 99\.800 % on 4 images"):
        check(measured({**good, "onnxruntime": 0.998}), limits)
    with pytest.raises(InputError, match=r"in openvino: wanted .* 97 % of pixels, got 96\.900 %"):
        check(measured({**good, "openvino": 0.969}), limits)
    with pytest.raises(InputError, match="got nan %"):
        check(measured({"onnxruntime": float("nan")}), limits)
    with pytest.raises(InputError, match=r"in openvino: wanted a loss of at most 1 points of mIoU .*, got 1\.10"):
        check(measured({"openvino": 1.0}, {"torch": 0.6, "openvino": 0.589}), limits)
    check(measured({"openvino": 1.0}, {"torch": 0.2, "openvino": 0.2019}, "AbsRel"), limits)
    with pytest.raises(InputError, match=r"points of AbsRel against torch, got 2\.00"):
        check(measured({"openvino": 1.0}, {"torch": 0.2, "openvino": 0.204}, "AbsRel"), limits)


def test_rendered_scenes_stand_in_for_photos() -> None:
    scenes = from_scenes(7, 2)
    assert [image.shape for image in scenes.images] == [(360, 480, 3)] * 2
    assert (scenes.images[0] != scenes.images[1]).any()
    assert scenes.truths is None


def test_measure_leaves_the_threads_alone(model: DensePredictor, exported: tuple[Path, Receipt]) -> None:
    before = torch.get_num_threads()
    again = measure(exported[0], TorchSession(ArtifactGraph(model, TASKS)), PHOTOS, CLASSES)
    assert again.threads == torch.get_num_threads() == before
    assert again.agreement == exported[1].agreement
