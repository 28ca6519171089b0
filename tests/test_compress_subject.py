"""What is compressed: classifiers as timm prepares photos for them, dense answers and how far they moved, photos."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from denselab import _vision as _vision

# isort: split
import timm
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from denselab.checkpoint import LoadedModel, ModelCard
from denselab.compress.photos import PhotoFile, labelled, list_photos, read_some
from denselab.compress.subject import (
    Classifier,
    Photos,
    dense_change,
    dense_likelihood,
    dense_start,
    dense_subject,
    open_classifier,
)
from denselab.errors import InputError
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind
from tiny_classifier import MODEL, NAMES, SIDE_PX, photo, save, trained, write_photos
from tiny_models import CLASSES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained(), tmp_path_factory.mktemp("timm") / "colours")


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as raised:
        open_classifier(*arguments)
    return str(raised.value)


def test_photos_are_prepared_as_timm_does(folder: Path) -> None:
    subject = open_classifier(f"timm:{folder}")
    assert isinstance(subject.kind, Classifier)
    assert (subject.name, subject.kind.classes, subject.kind.names) == ("colours", 4, NAMES)
    picture = Image.fromarray(photo(1, 7, 40)).resize((50, 40))
    data = resolve_model_data_config(subject.network)
    wanted = create_transform(**data, is_training=False)(picture)
    got = subject.pixels(subject.seen(np.asarray(picture))[None])[0]
    assert got.shape == (3, SIDE_PX, SIDE_PX)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    logits = subject.network(got[None])
    assert NAMES[int(logits.argmax())] == "green"
    assert subject.change(logits, logits).item() == pytest.approx(0, abs=1e-7)
    assert subject.start(logits).item() == logits.max().item()


def test_weights_from_a_file_say_how_many_classes_there_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    subject = open_classifier("timm:test_vit", tmp_path / "w.pth")
    assert isinstance(subject.kind, Classifier)
    assert (subject.kind.classes, subject.kind.names) == (7, None)
    for name, value in subject.network.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_models_and_weights_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    assert "did you mean timm:test_vit?" in refusal("timm:test_vitt")
    assert "give --weights FILE" in refusal("timm:test_vit")
    assert "no such file" in refusal("timm:test_vit", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    assert "torch cannot load it" in refusal("timm:test_vit", tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "it is damaged" in refusal("timm:test_vit", tmp_path / "text.safetensors")
    assert f"wanted the weights of {MODEL}, but they do not fit" in refusal(f"timm:{folder}", _other(tmp_path))
    torch.save({"lr": 0.1}, tmp_path / "other.pth")
    assert "got something else" in refusal("timm:test_vit", tmp_path / "other.pth")
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refusal(f"timm:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "it is damaged ('architecture')" in refusal(f"timm:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_text((folder / "config.json").read_text())
    assert "got no model.safetensors" in refusal(f"timm:{tmp_path / 'empty'}")


def _other(folder: Path) -> Path:
    torch.save({"head.weight": torch.zeros(4, 16)}, folder / "head.pth")
    return folder / "head.pth"


def spec(kind: ValueKind, queries: int = 2, norm: MaskNorm = MaskNorm.SOFTMAX) -> HeadSpec:
    return HeadSpec(queries, queries, 4, norm, kind)


def identity(masks: torch.Tensor) -> QueryOutput:
    return QueryOutput(masks, torch.eye(masks.shape[1])[None].expand(len(masks), -1, -1))


def test_changes_by_hand() -> None:
    even, sure = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0, 0]], [[3.0, 0]]]]).log1p()
    semantic = dense_change("semantic", spec(ValueKind.IDENTITY))
    # one of two pixels says 1/5 and 4/5 where 1/2 and 1/2 were wanted: (log(5/2) + log(5/8)) / 2 / 2
    assert semantic(identity(sure), identity(even)).item() == pytest.approx(0.2231 / 2, abs=1e-4)
    depth = dense_change("depth", spec(ValueKind.IDENTITY, 1))
    metres = torch.tensor([[[[3.0, 4.0]]]])
    assert depth(identity(metres + 1), identity(metres)).item() == pytest.approx(2 / 25)
    normals = dense_change("normals", spec(ValueKind.IDENTITY, 3))
    up, right = (torch.eye(3)[None, :, which, None, None].contiguous() for which in (1, 0))
    assert normals(identity(5 * up), identity(up)).item() == pytest.approx(0, abs=1e-6)
    assert normals(identity(right), identity(up)).item() == pytest.approx(1)
    masks = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([masks[:, :2], 2 * masks[:, 2:]], dim=1)
    centres = dense_change("panoptic", spec(ValueKind.CENTRE_OFFSET, 5))
    torch.testing.assert_close(centres(identity(moved), identity(masks)).float(), torch.ones(2))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("semantic", ValueKind.IDENTITY),
        ("semantic", ValueKind.BLENDED),
        ("semantic", ValueKind.CLASS_LOGITS),
        ("instance", ValueKind.CLASS_LOGITS),
        ("panoptic", ValueKind.CENTRE_OFFSET),
        ("depth", ValueKind.BLENDED),
        ("normals", ValueKind.IDENTITY),
    ],
)
def test_every_head_has_a_change_and_starts_that_gradients_reach(task: str, kind: ValueKind) -> None:
    generator = torch.Generator().manual_seed(0)
    width = 1 if task == "depth" else 3
    queries = {ValueKind.CENTRE_OFFSET: 5, ValueKind.IDENTITY: 3}.get(kind, 4)
    masks = torch.randn(2, queries, 3, 4, generator=generator, requires_grad=True)
    output = QueryOutput(masks, torch.randn(2, queries, width, generator=generator))
    head = HeadSpec(queries, width, 4, MaskNorm.SOFTMAX, kind)
    change = dense_change(task, head)
    assert change(output, output).abs().max() < 1e-6
    other = replace(output, mask_logits=torch.randn(masks.shape, generator=generator))
    assert change(other, output).shape == (2,)
    assert change(other, output).min() > 0
    for begin in (dense_start(task, head), dense_likelihood(task, head)):
        begun = begin(output)
        assert begun.shape == (2,)
        (gradient,) = torch.autograd.grad(begun.sum(), [masks])
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_dense_photos_keep_their_size_and_are_shrunk_where_the_predictor_does() -> None:
    card = ModelCard(("semantic",), "small", {}, CLASSES, (48, 64), None, "CC-BY-4.0")
    subject = dense_subject(LoadedModel(tiny_model(), card), "tiny")
    assert subject.seen(photo(0, 0, 60)).shape == (3, 60, 60)
    assert subject.seen(photo(0, 0, 200)).shape == (3, 64, 64)
    seen = tuple(subject.seen(photo(0, i, side)) for i, side in enumerate((32, 32, 48, 32)))
    batches = Photos(subject, seen, at_once=2)
    assert [tuple(each.shape) for each in batches] == [(2, 3, 32, 32), (1, 3, 48, 48), (1, 3, 32, 32)]
    assert len(batches) == 3
    first = next(iter(batches))
    assert torch.equal((first[0] * 255).round().byte().permute(1, 2, 0), torch.tensor(photo(0, 0, 32)))
    with torch.no_grad():
        output = subject.network(first)
    assert subject.change(output, output).abs().max() < 1e-6


def test_photos_are_spread_and_unreadable_ones_replaced(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 3)
    (root / "blue" / "0.png").write_text("no picture")
    said: list[str] = []
    found = read_some(root, 4, said.append, lambda files: files)
    assert len(found) == 4
    assert len(said) == 1
    assert said[0].startswith(f"skipped: {root / 'blue' / '0.png'}: ")
    means = [each.mean(axis=(0, 1)).argmax() for each in found]
    assert {int(each) for each in means} >= {0, 1}
    assert len(read_some(root, 100, said.append, lambda files: files)) == 11
    assert f"{root}: 12 photos, fewer than the 100 asked for (--images)" in said
    for path in root.rglob("*.png"):
        path.write_text("no picture")
    with pytest.raises(InputError, match="none of 12 can be read"):
        read_some(root, 4, said.append, lambda files: files)


def test_no_photos(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="wanted at least one image there"):
        list_photos(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(InputError, match="at least one photo in the archive"):
        list_photos(tmp_path / "empty.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(InputError, match="cannot be read"):
        list_photos(tmp_path / "text.zip")


def zipped(folder: Path) -> Path:
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
    return archive


def test_a_folder_inside_of_an_archive(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "small" / "train", 2)
    write_photos(tmp_path / "photos" / "small" / "test", 1)
    archive = zipped(tmp_path / "photos")
    found = list_photos(archive / "small" / "train")
    assert [each.name for each in found] == [f"{name}/{number}.png" for name in NAMES for number in (0, 1)]
    assert str(found[0]) == f"{archive}/small/train/blue/0.png"
    below = list_photos(tmp_path / "photos" / "small" / "train")
    for one, other in zip(found, below, strict=True):
        assert (one.read() == other.read()).all()
    assert len(list_photos(archive)) == 12
    assert len(labelled(archive / "small" / "test", NAMES, 4).photos) == 4
    assert labelled(archive / "small", NAMES, 4).split == "test"
    for missing in ("tain", "small/tr", "small/train/blue/0.png"):
        with pytest.raises(InputError) as raised:
            list_photos(archive / missing)
        assert str(raised.value).startswith(
            f"{archive / missing}: wanted a folder of photos inside of {archive}, which"
        )
        assert "has photos in small, small/test, small/train, small/test/blue, small/test/green, " in str(raised.value)
        assert "; name one of them, or the archive alone for all" in str(raised.value)
    (tmp_path / "folder.zip").mkdir()
    write_photos(tmp_path / "folder.zip" / "train", 1)
    assert len(list_photos(tmp_path / "folder.zip" / "train")) == 4
    with pytest.raises(InputError, match="got a path that does not exist"):
        list_photos(tmp_path / "none.zip" / "train")


def test_folders_of_imagenet_are_in_the_order_of_its_classes(tmp_path: Path) -> None:
    ids = [f"n{7 * number:08d}" for number in range(1000)]
    with zipfile.ZipFile(tmp_path / "imagenet.zip", "w") as archive:
        for each in ids[::-1]:
            archive.writestr(f"val/{each}/0.png", "")
    names = tuple(f"class {number}" for number in range(1000))
    found = labelled(tmp_path / "imagenet.zip", names, 1000)
    assert [(photo.name, class_id) for photo, class_id in found.photos[6:8]] == [
        (f"val/{ids[6]}/0.png", 6),
        (f"val/{ids[7]}/0.png", 7),
    ]


def test_classes_are_folders_of_a_test_split_or_an_archive(tmp_path: Path) -> None:
    write_photos(tmp_path / "data" / "test", 2)
    write_photos(tmp_path / "data" / "train", 5)
    found = labelled(tmp_path / "data", NAMES, 4)
    assert (found.split, found.names, len(found.photos)) == ("test", NAMES, 8)
    packed = labelled(zipped(tmp_path / "data"), None, 4)
    assert [(each.name, class_id) for each, class_id in packed.photos] == [
        (each.name, class_id) for each, class_id in found.photos
    ]
    assert (packed.photos[0][0].read() == found.photos[0][0].read()).all()
    assert labelled(tmp_path / "data" / "train", NAMES, 4).split == "all"
    reordered = labelled(tmp_path / "data", NAMES[::-1], 4)
    assert reordered.names == NAMES[::-1]
    assert [class_id for _, class_id in reordered.photos] == [3, 3, 2, 2, 1, 1, 0, 0]
    with pytest.raises(InputError, match=r"each of the model's 4 classes \(a, b, c, d\), got 4 \(blue, green"):
        labelled(tmp_path / "data", ("a", "b", "c", "d"), 4)
    with pytest.raises(InputError, match="each of the model's 3 classes, got 4"):
        labelled(tmp_path / "data", None, 3)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("red/0.png", "no picture")
    with pytest.raises(InputError, match=r"bad.zip/red/0.png: wanted a photo"):
        PhotoFile(tmp_path / "bad.zip", "red/0.png").read()
