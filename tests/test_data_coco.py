"""COCO panoptic and instances: values worked by hand, real data against its own JSON, and every mistake by name."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from denselab.data.check import ProblemKind, check
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.data.shapes import Shapes
from denselab.data.truth import SizeMismatchError, Truth, UnknownLabelError
from denselab.errors import InputError
from denselab.rle import encode
from denselab.segments import Segment
from tiny_data import photo, write_coco, write_ids

SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]
PNGS = "annotations/panoptic_train2017"


def segment(number: int, category_id: int = 1, iscrowd: int = 0) -> dict[str, int]:
    return {"id": number, "category_id": category_id, "iscrowd": iscrowd}


def shape(segmentation: Any, category_id: int = 1, **more: Any) -> dict[str, Any]:
    return {"category_id": category_id, "segmentation": segmentation, "iscrowd": 0} | more


def panoptic(root: Path, ids: Sequence[Sequence[int]], segments: Sequence[Mapping[str, Any]]) -> Path:
    """One image, "a"."""
    array = np.array(ids, np.int64)
    write_ids(root / PNGS / "a.png", array)
    return write_coco(root, "panoptic", {"a": segments}, (array.shape[0], array.shape[1]))


def first(dataset: Dataset, *tasks: str) -> Truth:
    return dataset.read(dataset.split("train")[0], tasks)[1]


def test_panoptic_by_hand(tmp_path: Path) -> None:
    panoptic(tmp_path, [[0, 70000, 70000, 9]], [segment(70000), segment(9, 7)])
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"semantic", "instance", "panoptic"}
    assert dataset.classes
    assert (dataset.classes.names, dataset.classes.things) == (("cat", "grass"), (0,))
    assert [item.name for item in dataset.split("train")] == ["a"]
    whole = first(dataset, "panoptic", "semantic")
    assert whole.class_ids is not None
    assert whole.class_ids.tolist() == [[255, 0, 0, 1]]
    assert whole.segments is not None
    assert whole.segments.layers.tolist() == [[[0, 70000, 70000, 9]]]
    assert whole.void is not None
    assert whole.void.tolist() == [[True, False, False, False]]
    things = first(dataset, "instance")
    assert things.segments is not None
    assert things.segments.layers.tolist() == [[[0, 70000, 70000, 0]]]
    assert things.class_ids is None


def test_only_what_a_task_needs_is_read(tmp_path: Path) -> None:
    panoptic(tmp_path, [[0, 5]], [segment(5)])
    dataset = open_dataset(tmp_path)
    truth = first(dataset, "semantic")
    assert truth.segments is None
    with pytest.raises(InputError, match=r"wanted truth for depth, got data with instance, panoptic, semantic only"):
        first(dataset, "depth")


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        (
            [[0, 5, 6, 6]],
            [segment(5)],
            r"a\.png: wanted ids that panoptic_train2017\.json lists, got ids 6 \(2 px\)",
        ),
        (
            [[0, 5]],
            [segment(5), segment(8)],
            r"a\.png: wanted a pixel of every id .*json lists, got none of \[8\]",
        ),
    ],
)
def test_ids_that_png_and_json_do_not_share(
    tmp_path: Path, ids: list[list[int]], segments: list[dict[str, int]], message: str
) -> None:
    panoptic(tmp_path, ids, segments)
    with pytest.raises(UnknownLabelError, match=message):
        first(open_dataset(tmp_path), "panoptic")
    assert [problem.kind for problem in check(tmp_path).problems] == [ProblemKind.UNKNOWN_LABEL]


def test_png_of_another_size(tmp_path: Path) -> None:
    panoptic(tmp_path, [[0, 5]], [segment(5)])
    write_ids(tmp_path / PNGS / "a.png", np.array([[5]]))
    with pytest.raises(SizeMismatchError, match=r"a\.png: wanted the size of its image .*2x1 px, got 1x1 px"):
        first(open_dataset(tmp_path), "panoptic")


def test_missing_files_are_left_out_and_said(tmp_path: Path) -> None:
    panoptic(tmp_path, [[0, 5]], [segment(5)])
    path = tmp_path / "annotations/panoptic_train2017.json"
    data = json.loads(path.read_text())
    data["images"] += [{"id": 2, "file_name": "gone.png"}, {"id": 3, "file_name": "bare.png"}]
    photo(tmp_path / "images/train2017/bare.png", (1, 2))
    path.write_text(json.dumps(data))
    dataset = open_dataset(tmp_path)
    assert [(lone.path.name, lone.missing) for lone in dataset.left_out] == [
        ("bare.png", "panoptic annotation"),
        ("gone.png", "image"),
    ]
    assert any("image files that are not there are left out: 1" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, r"\.json: wanted a COCO file with lists of images, annotations, categories, got"),
        (
            {"categories": [{"id": 2, "name": "dog"}]},
            r"image 1, segment 5: wanted a category_id out of 2, got 1",
        ),
        ({"categories": [{"name": "dog"}]}, r"wanted every category with id and name, got \{'name': 'dog'\}"),
        ({"annotations": [{"image_id": 4}]}, r"wanted annotations of listed images, got image_id 4"),
        (
            {"annotations": [{"image_id": 1, "bbox": []}]},
            r"image 1: wanted one annotation with file_name",
        ),
        ({"images": []}, r"wanted annotations of listed images"),
        (
            {"images": [{"id": 1, "file_name": "b.png"}]},
            r"wanted the images it lists, such as b\.png",
        ),
    ],
)
def test_a_json_that_is_not_panoptic(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = panoptic(tmp_path, [[0, 5]], [segment(5)])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path)


def test_a_json_that_does_not_parse(tmp_path: Path) -> None:
    path = panoptic(tmp_path, [[0, 5]], [segment(5)])
    path.write_text("{")
    with pytest.raises(InputError, match=r"panoptic_train2017\.json: wanted COCO annotations in JSON, got"):
        open_dataset(tmp_path)
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"wanted a COCO file with lists of images, .* got list"):
        open_dataset(tmp_path)


def test_splits_with_other_categories(tmp_path: Path) -> None:
    panoptic(tmp_path, [[0, 5]], [segment(5)])
    write_ids(tmp_path / "annotations/panoptic_val2017/b.png", np.array([[5]]))
    write_coco(tmp_path, "panoptic", {"b": [segment(5)]}, (1, 1), [(1, "dog", 1), (7, "grass", 0)], "val2017")
    with pytest.raises(InputError, match=r"panoptic_val2017\.json: wanted the categories of .*, such as 1 cat, 1 dog"):
        open_dataset(tmp_path)


def test_coco200_areas_are_those_in_its_json(shared_data: Path) -> None:
    root = shared_data / "coco200_panoptic"
    dataset = open_dataset(root)
    assert {split: len(items) for split, items in dataset.splits.items()} == {"train": 100, "val": 100}
    assert dataset.classes
    assert (len(dataset.classes), len(dataset.classes.things)) == (133, 80)
    data = json.loads((root / "panoptic_segmentation/annotations/panoptic_val2017.json").read_text())
    listed = {Path(a["file_name"]).stem: a["segments_info"] for a in data["annotations"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    for item in dataset.split("val")[:25]:
        truth = dataset.read(item, {"panoptic", "semantic"})[1]
        assert truth.segments is not None
        assert truth.class_ids is not None
        found = {s.id: (s, int(truth.segments.mask(s).sum())) for s in truth.segments.segments}
        assert {i: area for i, (_, area) in found.items()} == {s["id"]: s["area"] for s in listed[item.name]}
        for info in listed[item.name]:
            here, _ = found[info["id"]]
            assert dataset.classes.names[here.class_id] == names[info["category_id"]]
            assert here.is_crowd == bool(info["iscrowd"])
        masks = root / "semantic_segmentation/masks/val2017" / f"{item.name}.png"
        categories = np.array(Image.open(masks))
        same = np.array([dataset.classes.names.index(names[c]) if c in names else 255 for c in range(256)])[categories]
        uncrowded = ~np.isin(truth.segments.layers[0], [i for i, (s, _) in found.items() if s.is_crowd])
        assert np.array_equal(truth.class_ids[uncrowded], same[uncrowded])


def test_instances_by_hand(tmp_path: Path) -> None:
    run = np.zeros((6, 8), bool)
    run[2:6, 4:8] = True
    compressed = {"size": [6, 8], "counts": encode(run).to_string()}
    plain = {"size": [6, 8], "counts": encode(run[::-1]).counts.tolist()}
    annotations = [shape([SQUARE]), shape(compressed, 7), shape(plain, iscrowd=1)]
    write_coco(tmp_path, "instances", {"a": annotations})
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"instance"}
    assert dataset.classes
    assert dataset.classes.things == (0, 1)
    truth = first(dataset, "instance")
    assert truth.segments is not None
    assert truth.segments.segments == (Segment(1, 0), Segment(2, 1), Segment(3, 0, is_crowd=True))
    square, second, crowd = truth.segments.masks()
    assert np.argwhere(square).min(axis=0).tolist() == [1, 1]
    assert square.sum() == 12
    assert np.array_equal(second, run)
    assert np.array_equal(crowd, run[::-1])
    assert len(truth.segments.layers) == 3, "all three overlap"
    assert truth.void is not None
    assert np.array_equal(truth.void, crowd)


def test_an_image_without_objects_is_background(tmp_path: Path) -> None:
    write_coco(tmp_path, "instances", {"a": [], "b": [shape([SQUARE], iscrowd=1)]})
    dataset = open_dataset(tmp_path)
    truths = {item.name: dataset.read(item, {"instance"})[1] for items in dataset.splits.values() for item in items}
    for name, void_px in (("a", 0), ("b", 12)):
        segments, void = truths[name].segments, truths[name].void
        assert segments is not None
        assert void is not None
        assert void.sum() == void_px
        assert all(segment.is_crowd for segment in segments.segments)
    report = check(tmp_path)
    assert not report.problems
    text = "\n".join(report.notes)
    assert "images without objects: 1, such as a" in text
    assert "images without objects but crowds: 1, such as b" in text


def test_background_makes_instances_panoptic(tmp_path: Path) -> None:
    write_coco(tmp_path, "instances", {"a": [shape([SQUARE])]})
    (tmp_path / "dataset.yaml").write_text("background: elsewhere\n")
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"instance", "panoptic", "semantic"}
    assert dataset.classes
    assert dataset.classes.names == ("cat", "grass", "elsewhere")
    truth = first(dataset, "semantic")
    assert truth.class_ids is not None
    assert (truth.class_ids == 0).sum() == 12
    assert (truth.class_ids == 2).sum() == 36


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (shape([SQUARE], 3), r"image 1, annotation 10: wanted a category_id out of 1, 7, got 3; add it to categories"),
        (shape([[1, 2, 3]]), r"annotation 10: wanted polygons \[\[x, y, x, y, \.\.\.\], \.\.\.\] or runs"),
        (shape("box"), r"annotation 10: wanted polygons .* got 'box'; export it again"),
        (shape([[1, 2, 3, 4, None, 5]]), r"annotation 10: wanted polygons"),
        (
            shape([]),
            r"wanted segmentations, got 1 annotations without one \(annotation 10 has none\)",
        ),
    ],
)
def test_segmentations_that_cannot_be_used(tmp_path: Path, annotation: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, "instances", {"a": [annotation]})
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (shape({"size": [6, 8], "counts": [10, 3]}), r"annotation 10: counts: wanted runs that fill 8x6 px, got 13 px"),
        (shape({"size": [3, 3], "counts": [9]}), r"annotation 10: wanted runs of the image's size, 8x6 px, got 3x3 px"),
    ],
)
def test_runs_that_do_not_fit(tmp_path: Path, annotation: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, "instances", {"a": [annotation]})
    with pytest.raises(InputError, match=message):
        first(open_dataset(tmp_path), "instance")


def test_image_of_another_size_than_the_json_says(tmp_path: Path) -> None:
    write_coco(tmp_path, "instances", {"a": [shape([SQUARE])]})
    photo(tmp_path / "images/train2017/a.png", (6, 9))
    with pytest.raises(SizeMismatchError, match=r"a\.png: wanted the size of the image file, 9x6 px, got 8x6 px"):
        first(open_dataset(tmp_path), "instance")


def test_check_names_objects_outside_and_twice(tmp_path: Path) -> None:
    outside = [number + 50 for number in SQUARE]
    write_coco(tmp_path, "instances", {"a": [shape([SQUARE]), shape([outside]), shape([SQUARE]), shape([SQUARE], 7)]})
    report = check(tmp_path)
    texts = {problem.kind: problem.text for problem in report.problems}
    assert texts.keys() == {ProblemKind.OUTSIDE, ProblemKind.TWICE}
    assert texts[ProblemKind.OUTSIDE].endswith("instances_train2017.json: a: annotation 11 has no pixel in the image")
    assert texts[ProblemKind.TWICE].endswith("a: annotations 10 and 12 cover the same pixels")
    objects = report.splits["train"].objects
    assert objects
    assert (objects.of_class, objects.per_image) == ((2, 1), (3, 3, 3))


def test_annotations_without_a_shape_are_left_out_and_said(tmp_path: Path) -> None:
    write_coco(tmp_path, "instances", {"a": [shape([SQUARE]), shape([[1, 1, 2, 2]])]})
    dataset = open_dataset(tmp_path)
    assert dataset.notes[0].endswith("without a usable segmentation are left out: 1, such as annotation 11")


def test_roboflow_files_beside_the_images(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        path = write_coco(tmp_path, "instances", {"a": [shape([SQUARE])]}, split=split)
        photo(tmp_path / split / "a.png", (6, 8))
        (tmp_path / "images" / split / "a.png").unlink()
        path.rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    dataset = open_dataset(tmp_path)
    assert [(split, items[0].image.parent) for split, items in dataset.splits.items()] == [
        ("train", tmp_path / "train"),
        ("val", tmp_path / "valid"),
    ]


def test_annotations_may_lie_anywhere(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "data", "instances", {"a": [shape([SQUARE])]}, split="train")
    path.rename(tmp_path / "cells.json")
    text = "root: data\nannotations: {train: cells.json}\nthings: [cat]\n"
    (tmp_path / "my.yaml").write_text(text)
    dataset = open_dataset(tmp_path / "my.yaml")
    assert dataset.root == tmp_path / "data"
    assert dataset.classes
    assert dataset.classes.things == (0,)
    assert isinstance(dataset.split("train")[0].labels, Shapes)
    (tmp_path / "my.yaml").write_text(text.replace("cells", "calls"))
    with pytest.raises(InputError, match=r"my\.yaml: annotations: wanted a path in .*data, got 'calls\.json'"):
        open_dataset(tmp_path / "my.yaml")


def test_no_annotations_at_all(tmp_path: Path) -> None:
    for layout in ("coco_instances", "coco_panoptic"):
        (tmp_path / "dataset.yaml").write_text(f"layout: {layout}\n")
        with pytest.raises(InputError, match=r"or the like, got none; name them in .*annotations: \{train: FILE\}"):
            open_dataset(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_masks_stay_encoded(tmp_path: Path) -> None:
    """5000 photos with 7 outlines of 10 corners each: decoded they would be 35000 masks of 300 kB."""
    rng = np.random.default_rng(0)
    one = photo(tmp_path / "one.png", (480, 640))
    (tmp_path / "train").mkdir()
    outlines = rng.uniform(0, 480, (35, 20)).round(2).tolist()
    images = [{"id": i, "file_name": f"{i:04d}.png", "height": 480, "width": 640} for i in range(5000)]
    for image in images:
        (tmp_path / "train" / image["file_name"]).symlink_to(one)
    annotations = [
        {"id": i, "image_id": i // 7, "category_id": 1, "iscrowd": 0, "segmentation": [outlines[i % 35]]}
        for i in range(35_000)
    ]
    path = tmp_path / "instances_train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    code = (  # VmHWM is of this program alone; ru_maxrss is at least what the process that started it had
        "import sys; from pathlib import Path; from denselab.data.descriptor import open_dataset; "
        "d = open_dataset(sys.argv[1]); status = Path('/proc/self/status').read_text(); "
        "print(len(d.split('train')) + len(d.split('val')), status.split('VmHWM:')[1].split()[0])"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    count, peak_kb = map(int, run.stdout.split())
    assert count == 5000
    assert peak_kb < 400_000
