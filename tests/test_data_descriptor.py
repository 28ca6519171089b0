"""Every layout, every descriptor key, and every mistake a user can make with them."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import STREET
from denselab.data.class_masks import ClassMask, MaskCoding
from denselab.data.dataset import Dataset, LeftOut
from denselab.data.descriptor import open_dataset
from denselab.data.truth import SizeMismatchError, UnknownLabelError
from denselab.errors import InputError


def save_image(path: Path, hw: tuple[int, int] = (2, 3), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*hw, 3), value, np.uint8)).save(path)
    return path


def save_mask(path: Path, ids: list[list[int]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(ids or [[0, 1, 2], [2, 1, 0]], np.uint8)).save(path)
    return path


def describe(root: Path, text: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.yaml").write_text(text, "utf-8")


def stems(root: Path, split: str) -> list[str]:
    return [pair.image.stem for pair in open_dataset(root).split(split)]


def read_ids(dataset: Dataset, split: str = "train", index: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    image, truth = dataset.read(dataset.split(split)[index], {"semantic"})
    assert truth.class_ids is not None
    return image, truth.class_ids


def fill(root: Path, image: str, mask: str, names: str) -> None:
    """One pair per letter; `image` and `mask` are patterns with {name}."""
    for name in names:
        save_image(root / image.format(name=name))
        save_mask(root / mask.format(name=name))


@pytest.mark.parametrize("masks", ["masks", "labels", "annotations"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "val2017"])
def test_splits_below_images_and_masks(tmp_path: Path, masks: str, val: str) -> None:
    fill(tmp_path, "images/train/{name}.jpg", masks + "/train/{name}.png", "abc")
    fill(tmp_path, f"images/{val}/{{name}}.png", f"{masks}/{val}/{{name}}.png", "d")
    dataset = open_dataset(tmp_path)
    assert {split: len(pairs) for split, pairs in dataset.splits.items()} == {"train": 3, "val": 1}
    coding = MaskCoding(((0, 0), (1, 1), (2, 2), (255, 255)), False, tmp_path / "dataset.yaml")
    assert dataset.splits["val"][0].labels == ClassMask(tmp_path / masks / val / "d.png", coding)
    assert stems(tmp_path, "train") == ["a", "b", "c"]


def test_images_and_masks_below_splits(tmp_path: Path) -> None:
    fill(tmp_path, "train/images/{name}.tif", "train/masks/{name}.tif", "ab")
    fill(tmp_path, "valid/images/{name}.webp", "valid/masks/{name}.png", "c")
    fill(tmp_path, "test/images/{name}.bmp", "test/masks/{name}.bmp", "d")
    assert [stems(tmp_path, split) for split in ("train", "val", "test")] == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("ending", ["", "_mask", "_L", "_labelIds", "_gt"])
def test_mask_names_may_end_in_what_the_docs_say(tmp_path: Path, ending: str) -> None:
    fill(tmp_path, "images/city one/{name}_ü.JPEG", "masks/city one/{name}_ü" + ending + ".png", "ab")
    dataset = open_dataset(tmp_path)
    assert sum(map(len, dataset.splits.values())) == 2
    assert not dataset.left_out


def test_flat_folder_is_split_by_the_hash_of_the_stem(tmp_path: Path) -> None:
    names = [f"{n:03d}" for n in range(60)]
    for name in names:
        fill(tmp_path, f"images/{name}.png", f"masks/{name}.png", "x")
    low = [n for n in names if int(hashlib.sha1(n.encode()).hexdigest(), 16) / 2**160 < 0.1]
    assert low, "the reference must choose some"
    assert stems(tmp_path, "val") == low
    assert stems(tmp_path, "train") == [n for n in names if n not in low]
    assert any(f"no val split: {len(low)} of 60 train images" in note for note in open_dataset(tmp_path).notes)


def test_val_is_carved_from_train_and_test_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, "images/train/{name}.png", "masks/train/{name}.png", "ab")
    fill(tmp_path, "images/test/{name}.png", "masks/test/{name}.png", "cd")
    dataset = open_dataset(tmp_path)
    assert [(split, len(pairs)) for split, pairs in dataset.splits.items()] == [("train", 1), ("val", 1), ("test", 2)]
    assert "no val split: 1 of 2 train images" in dataset.notes[-1]


def test_one_pair_is_train_only(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "a")
    with pytest.raises(InputError, match=r"wanted split val, got only train; choose one of these"):
        open_dataset(tmp_path).split("val")


def test_missing_test_split_lists_the_splits(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "ab")
    with pytest.raises(InputError, match=r"wanted split test, got only train, val"):
        open_dataset(tmp_path).split("test")


def test_files_without_a_partner_are_left_out_and_said(tmp_path: Path) -> None:
    fill(tmp_path, "images/train/{name}.png", "masks/train/{name}.png", "abc")
    lone_image = save_image(tmp_path / "images/train/no mask.png")
    lone_mask = save_mask(tmp_path / "masks/train/zz.png")
    save_image(tmp_path / "images/stray.png")
    save_image(tmp_path / "images/train/._a.png")
    dataset = open_dataset(tmp_path)
    assert dataset.left_out == (LeftOut(lone_image, "mask"), LeftOut(lone_mask, "image"))
    text = "\n".join(dataset.notes)
    assert "images without a mask are left out: 1" in text
    assert "truths without an image are left out: 1" in text
    assert "outside the split folders" in text


def test_scanned_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    pair_mask = save_mask(tmp_path / "masks/a.png", [[0, 3, 255], [3, 3, 1]])
    dataset = open_dataset(tmp_path)
    assert dataset.classes.names == ("class_0", "class_1", "class_2", "class_3")
    assert any("class_0 to class_3, from the ids in 1 of 1 masks" in note for note in dataset.notes)
    image, ids = read_ids(dataset)
    assert (image.dtype, image.shape, ids.dtype) == (np.uint8, (2, 3, 3), np.uint8)
    assert ids.tolist() == [[0, 3, 255], [3, 3, 1]], pair_mask


def test_scan_is_bounded_and_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denselab.data.class_masks.SCAN_LIMIT", 2)
    fill(tmp_path, "images/train/{name}.png", "masks/train/{name}.png", "abcd")
    fill(tmp_path, "images/val/{name}.png", "masks/val/{name}.png", "e")
    save_mask(tmp_path / "masks/train/b.png", [[9, 0, 0], [0, 0, 0]])
    dataset = open_dataset(tmp_path)  # reads a and d
    assert any("class_0 to class_2, from the ids in 2 of 5 masks" in note for note in dataset.notes)
    with pytest.raises(UnknownLabelError, match=r"b\.png: wanted ids 0, 1, 2, 255, got ids 9 \(1 px\)"):
        read_ids(dataset, "train", 1)


def test_ids_0_to_11_are_not_camvid_without_its_names(tmp_path: Path) -> None:
    save_image(tmp_path / "images/train/0001.png", (1, 12))
    save_mask(tmp_path / "masks/train/0001.png", [list(range(12))])
    assert len(open_dataset(tmp_path).classes) == 12


def test_camvid_names_give_street_classes(tmp_path: Path) -> None:
    for sequence in ("0001TP_", "Seq05VD_"):
        save_image(tmp_path / f"images/train/{sequence}1.png", (1, 12))
        save_mask(tmp_path / f"masks/train/{sequence}1.png", [list(range(12))])
    dataset = open_dataset(tmp_path)
    assert dataset.classes == STREET
    assert any("CamVid" in note for note in dataset.notes)
    assert read_ids(dataset)[1].tolist() == [[*range(11), 255]]


def test_names_as_list_with_ignored_ids(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "a")
    describe(tmp_path, "names: [ground, clutter, house]\ncolours: [[1, 2, 3], [4, 5, 6], [7, 8, 9]]\nignore: 1\n")
    dataset = open_dataset(tmp_path)
    assert dataset.classes.names == ("ground", "house")
    assert dataset.classes.colours == ((1, 2, 3), (7, 8, 9))
    assert read_ids(dataset)[1].tolist() == [[0, 255, 1], [1, 255, 0]]


def test_names_by_id_in_json(tmp_path: Path) -> None:
    fill(tmp_path, "photos/{name}.png", "truth/{name}.png", "a")
    names = {"2": "house", "0": "ground"}
    described = {"names": names, "ignore": [1], "images": "photos", "masks": "truth"}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    dataset = open_dataset(tmp_path)
    assert dataset.classes.names == ("ground", "house")
    assert read_ids(dataset)[1].tolist() == [[0, 255, 1], [1, 255, 0]]


def test_255_is_a_class_where_it_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    save_mask(tmp_path / "masks/a.png", [[0, 255, 0], [0, 0, 255]])
    with pytest.raises(InputError, match=r"got only \[0, 255\].*names: \{0: background, 255: object\}"):
        open_dataset(tmp_path)
    describe(tmp_path, "names: {0: background, 255: object}")
    dataset = open_dataset(tmp_path)
    assert read_ids(dataset)[1].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_coloured_masks(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png", (1, 3))
    (tmp_path / "masks").mkdir()
    mask = np.array([[[128, 0, 0], [0, 0, 0], [0, 64, 128]]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks/a_L.png")
    text = "names: [wall, water]\ncolours: [[128, 0, 0], [0, 64, 128]]\nrgb_masks: true\n"
    describe(tmp_path, text + "ignore: [[0, 0, 0]]\n")
    dataset = open_dataset(tmp_path)
    assert read_ids(dataset)[1].tolist() == [[0, 255, 1]]
    describe(tmp_path, text)
    dataset = open_dataset(tmp_path)
    with pytest.raises(UnknownLabelError, match=r"a_L\.png: wanted colours .*, got colours \[0, 0, 0\] \(1 px\); add"):
        read_ids(dataset)


def test_coloured_masks_without_a_descriptor_say_what_to_write(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    save_image(tmp_path / "masks/a.png")
    with pytest.raises(InputError, match=r"a\.png.*rgb_masks, names and colours in dataset\.yaml"):
        open_dataset(tmp_path)


def test_16_bit_masks(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png", (1, 2))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[300, 7]], np.uint16)).save(tmp_path / "masks/a.png")
    with pytest.raises(InputError, match=r"wanted class ids 0\.\.254, got ids up to 300 \(instance ids\?\)"):
        open_dataset(tmp_path)
    describe(tmp_path, "names: {7: ship, 300: sea}")
    dataset = open_dataset(tmp_path)
    assert read_ids(dataset)[1].tolist() == [[1, 0]]


def test_unknown_ids_name_file_ids_counts_and_mend(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "a")
    describe(tmp_path, "names: [ground]")
    dataset = open_dataset(tmp_path)
    expected = (
        f"{tmp_path / 'masks/a.png'}: wanted ids 0, 255, got ids 1 (2 px), 2 (2 px); "
        f"add them to ignore: or names: in {tmp_path / 'dataset.yaml'}, or mend the mask"
    )
    with pytest.raises(UnknownLabelError, match=re.escape(expected)):
        read_ids(dataset)


def test_mask_of_another_size_names_both(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png", (4, 6))
    save_mask(tmp_path / "masks/a.png")
    dataset = open_dataset(tmp_path)
    with pytest.raises(SizeMismatchError, match=r"a\.png: wanted the size of its image .*a\.png, 6x4 px, got 3x2 px"):
        read_ids(dataset)


def test_exif_rotated_image_with_an_unrotated_mask(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images/a.jpg", exif=exif)
    save_mask(tmp_path / "masks/a.png")
    dataset = open_dataset(tmp_path)
    with pytest.raises(SizeMismatchError, match=r"2x3 px, got 3x2 px; .* fits the image before its EXIF rotation"):
        read_ids(dataset)
    save_mask(tmp_path / "masks/a.png", [[0, 1], [1, 2], [2, 0]])
    assert read_ids(dataset)[0].shape == (3, 2, 3)


def test_a_broken_mask_does_not_hide_the_others(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "ab")
    (tmp_path / "masks/a.png").write_bytes(b"no picture")
    assert len(open_dataset(tmp_path).classes) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", r"wanted YAML or JSON, got text that does not parse"),
        ("- a", r"wanted keys out of names, colours"),
        ("nmaes: [a]", r"wanted keys out of names, .*, got nmaes; rename or remove"),
        ("names: house", r"names: wanted a list, or a mapping of mask id to one, got 'house'"),
        ("names: [yes, no]", r"names: wanted texts \(quote numbers, yes and no\)"),
        ("names: {-1: a}", r"names: wanted mask ids in 0\.\.65535, got -1"),
        ("names: [a, a]", r"wanted distinct names"),
        ("names: [a, b]\ncolours: [[1, 2, 3]]", r"colours: wanted one for each of the 2 names, got 1"),
        ("names: [a]\ncolours: [[1, 2, 300]]", r"colours: wanted \[red, green, blue\] in 0\.\.255, got \[1, 2, 300\]"),
        ("names: [a]\nignore: x", r"ignore: wanted mask ids in 0\.\.65535, got 'x'"),
        ("names: [a]\nrgb_masks: 3", r"rgb_masks: wanted true or false, got 3"),
        ("names: [a]\nrgb_masks: true", r"colours: wanted one for each of the 1 names, got 0"),
        ("rgb_masks: true", r"rgb_masks needs names and colours"),
        ("names: [a, b]\nrgb_masks: true\ncolours: [[1, 2, 3], [1, 2, 3]]", r"got one colour twice"),
        ("images: photos", r"wanted a folder of images \(photos/.*got dataset\.yaml, images, masks; move"),
        ("masks: 3", r"masks: wanted a folder's name, got 3"),
    ],
)
def test_descriptor_mistakes(tmp_path: Path, text: str, message: str) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "a")
    describe(tmp_path, text)
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path)


def test_two_descriptors_are_refused(tmp_path: Path) -> None:
    describe(tmp_path, "names: [a]")
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"wanted one descriptor, got dataset\.yaml and dataset\.json; remove one"):
        open_dataset(tmp_path)


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wanted a data folder, got no such folder"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(InputError, match=r"wanted a folder of images \(images/.*got nothing; move the files there"):
        open_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"wanted a folder of masks \(masks/.*got images; move"):
        open_dataset(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match=r"wanted images, got an empty dataset: no image in .*images \+ "):
        open_dataset(tmp_path)
    save_image(tmp_path / "images/a.png")
    save_image(tmp_path / "masks/a.jpg")
    save_mask(tmp_path / "masks/b.png")
    with pytest.raises(InputError, match=r"got none for any of 1 .* first image is a\.png, the first mask b\.png"):
        open_dataset(tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match=r"wanted one mask folder, got masks and labels; say which in .*masks: masks"):
        open_dataset(tmp_path)


def test_ambiguous_files_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "images/{name}.png", "masks/{name}.png", "a")
    save_image(tmp_path / "images/a.jpg")
    with pytest.raises(InputError, match=r"wanted one file per name, got a\.jpg and a\.png; remove one"):
        open_dataset(tmp_path)


def test_camvid(camvid: Path) -> None:
    dataset = open_dataset(camvid)
    assert {split: len(pairs) for split, pairs in dataset.splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert dataset.classes == STREET
    assert not dataset.left_out
    item = dataset.split("test")[7]
    image, ids = read_ids(dataset, "test", 7)
    truth = np.array(Image.open(camvid / "labels/test" / f"{item.name}.png"))
    assert np.array_equal(image, np.array(Image.open(item.image).convert("RGB")))
    assert np.array_equal(ids, np.where(truth == 11, 255, truth))
