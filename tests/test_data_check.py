"""What `check` counts, against hand-made pixels and an independent count over CamVid; and every problem it names."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.classes import STREET
from denselab.data.check import ProblemKind, Report, check
from denselab.data.dataset import Item
from denselab.data.descriptor import open_dataset
from denselab.data.sheet import choose_items, draw_sheet
from denselab.errors import InputError


def add(root: Path, split: str, name: str, ids: list[list[int]], value: int = 0) -> None:
    mask = np.array(ids, np.uint8)
    for kind, pixels in (("images", np.full((*mask.shape, 3), value, np.uint8)), ("masks", mask)):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / kind / split / f"{name}.png")


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    add(tmp_path, "train", "a", [[0, 1, 2], [2, 2, 255]], 1)
    add(tmp_path, "train", "b", [[0, 0, 0, 0]], 2)
    add(tmp_path, "train", "c", [[1] * 10] * 10, 3)
    add(tmp_path, "val", "d", [[0, 1], [2, 7]], 4)
    (tmp_path / "dataset.yaml").write_text("names: [sky, road, car, train]\nignore: 7\n")
    return tmp_path


def problems(report: Report, kind: ProblemKind) -> list[str]:
    assert {problem.kind for problem in report.problems} == {kind}
    return [problem.text for problem in report.problems]


def test_counts_worked_by_hand(clean: Path) -> None:
    report = check(clean)
    assert not report.problems
    train, val = report.splits["train"], report.splits["val"]
    assert (train.images, val.images) == (3, 1)
    assert train.sizes_hw == {(2, 3): 1, (1, 4): 1, (10, 10): 1}
    assert train.size_range_hw() == ((1, 4), (2, 3), (10, 10))
    assert (train.class_pixels, train.class_images) == ((5, 101, 3, 0), (2, 2, 1, 0))
    assert (train.void_pixels, val.void_pixels) == (1, 1)
    assert val.class_pixels == (1, 1, 1, 0)
    assert report.notes == ("not in train, val: train",)


def test_report_as_json(clean: Path) -> None:
    data = json.loads(json.dumps(check(clean).to_dict()))
    assert data["ok"] is True
    assert data["splits"]["train"]["classes"][1] == {
        "id": 1,
        "name": "road",
        "pixels": 101,
        "share": 101 / 110,
        "images": 2,
    }
    assert data["splits"]["val"]["sizes"] == [[2, 2, 1]]
    assert data["splits"]["val"]["void"] == {"pixels": 1, "share": 0.25}


def test_progress_sees_every_image(clean: Path) -> None:
    seen: list[str] = []

    def track(items: Iterable[tuple[str, Item]], total: int, label: str) -> Iterable[tuple[str, Item]]:
        assert (total, label) == (4, "check")
        for split, item in items:
            seen.append(split + item.name)
            yield split, item

    check(clean, track)
    assert seen == ["traina", "trainb", "trainc", "vald"]


def test_unreadable_files_are_named_and_the_rest_is_counted(clean: Path) -> None:
    image = clean / "images/train/a.png"
    image.write_bytes(image.read_bytes()[:45])
    (clean / "masks/train/b.png").write_bytes(b"")
    add(clean, "train", "e", [[2, 0]], 9)
    report = check(clean)
    assert [text.split(":")[0] for text in problems(report, ProblemKind.UNREADABLE)] == [
        str(image),
        str(clean / "masks/train/b.png"),
    ]
    assert report.splits["train"].class_images == (1, 1, 1, 0)
    assert report.splits["train"].images == 4


def test_all_files_unreadable(clean: Path) -> None:
    for image in clean.glob("images/*/*.png"):
        image.write_bytes(b"text")
    report = check(clean)
    assert len(problems(report, ProblemKind.UNREADABLE)) == 4
    assert report.splits["val"].size_range_hw() is None
    assert json.dumps(report.to_dict())


def test_mask_of_another_size(clean: Path) -> None:
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(clean / "masks/train/b.png")
    (text,) = problems(check(clean), ProblemKind.SIZE_MISMATCH)
    assert text.startswith(f"{clean / 'masks/train/b.png'}: wanted the size of its image ")
    assert "4x1 px, got 3x3 px" in text


def test_labels_out_of_range(clean: Path) -> None:
    add(clean, "train", "e", [[4, 4, 200, 0]], 9)
    (text,) = problems(check(clean), ProblemKind.UNKNOWN_LABEL)
    assert text.startswith(
        f"{clean / 'masks/train/e.png'}: wanted ids 0, 1, 2, 3, 7, 255, got ids 4 (2 px), 200 (1 px)"
    )


def test_files_without_partner(clean: Path) -> None:
    (clean / "masks/train/b.png").unlink()
    assert problems(check(clean), ProblemKind.NO_TRUTH) == [f"{clean / 'images/train/b.png'}: no mask"]
    (clean / "images/train/b.png").unlink()
    Image.new("L", (1, 1)).save(clean / "masks/val/z.png")
    assert problems(check(clean), ProblemKind.NO_IMAGE) == [f"{clean / 'masks/val/z.png'}: no image"]


def test_the_same_pixels_in_two_splits(clean: Path) -> None:
    """The copy is another file (other compression, other name) with the same pixels; copies within a split are fine."""
    for split, name in (("val", "copy"), ("train", "twin")):
        add(clean, split, name, [[1] * 10] * 10, 3)
        Image.open(clean / "images/train/c.png").save(clean / f"images/{split}/{name}.png", compress_level=0)
    (text,) = problems(check(clean), ProblemKind.LEAK)
    assert text == (
        f"the same image: {clean / 'images/train/c.png'} (train), {clean / 'images/train/twin.png'} (train), "
        f"{clean / 'images/val/copy.png'} (val)"
    )


def test_a_class_that_train_lacks(clean: Path) -> None:
    add(clean, "val", "e", [[3]], 9)
    (text,) = problems(check(clean), ProblemKind.NOT_IN_TRAIN)
    assert text == "class 3 train: in val but not in train, so it cannot be learned"


def test_camvid_agrees_with_an_independent_count(camvid: Path, tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            for path in sorted((camvid / kind / split).glob(f"*.{suffix}"))[::30][:count]:
                (tmp_path / kind / split / path.name).symlink_to(path)
    report = check(tmp_path)
    assert report.classes == STREET
    for split, found in report.splits.items():
        masks = [np.array(Image.open(path)) for path in sorted((tmp_path / "labels" / split).iterdir())]
        assert found.images == len(masks)
        assert found.sizes_hw == {(360, 480): len(masks)}
        assert found.class_pixels == tuple(sum(int((mask == k).sum()) for mask in masks) for k in range(11))
        assert found.class_images == tuple(sum(bool((mask == k).any()) for mask in masks) for k in range(11))
        assert found.void_pixels == sum(int((mask == 11).sum()) for mask in masks)


def test_chosen_items_follow_the_seed() -> None:
    items = tuple(Item(str(n), Path(f"{n}.jpg")) for n in range(50))
    assert choose_items(items, 5, 1) == choose_items(items, 5, 1) != choose_items(items, 5, 2)
    assert list(choose_items(items, 9, 3)) == sorted(choose_items(items, 9, 3), key=items.index)
    assert choose_items(items, 80, 0) == items


def test_sheet_shows_image_and_colours(tmp_path: Path) -> None:
    """A white image whose left half is class 0 (red) and right half void: only a quarter of the tile turns reddish."""
    add(tmp_path, "train", "a", [[0] * 160 + [255] * 160] * 320, 255)
    (tmp_path / "dataset.yaml").write_text("names: [paint]\ncolours: [[255, 0, 0]]\n")
    dataset = open_dataset(tmp_path)
    sheet = draw_sheet(dataset, dataset.split("train"))
    pixels = np.array(sheet.picture)
    reddish = (pixels[..., 0] > 250) & (pixels[..., 1] < 140)
    columns = np.flatnonzero(reddish[100])
    assert abs(len(columns) - 160) <= 4
    assert 320 < columns.min() < columns.max() < 500
    assert not sheet.failures


def test_sheet_leaves_out_broken_images(clean: Path) -> None:
    (clean / "masks/train/b.png").write_bytes(b"")
    dataset = open_dataset(clean)
    sheet = draw_sheet(dataset, dataset.split("train"))
    assert [str(failure).split(":")[0] for failure in sheet.failures] == [str(clean / "masks/train/b.png")]
    (clean / "images/val/d.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"d\.png: wanted an image, got an empty file"):
        draw_sheet(dataset, dataset.split("val"))
