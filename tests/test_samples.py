"""Samples and their random views: exact labels, reproducible, padded as announced."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from denselab.classes import VOID
from denselab.data.augment import LongSide, RandomFlip, RandomQuarterTurn, RandomZoomCrop, nearest, training_views
from denselab.data.copy_paste import copy_paste
from denselab.data.descriptor import open_dataset
from denselab.data.samples import DenseDataset, EpochSampler, FixedSampler, Sample, SampleKey, collate, pad_images
from denselab.data.scenes import write_scenes
from denselab.errors import InputError
from denselab.segments import Segment
from tiny_data import write_tiny


def seen(sample: Sample | InputError) -> tuple[Tensor, Tensor]:
    assert isinstance(sample, Sample)
    assert sample.class_ids is not None
    return sample.image, sample.class_ids


def zoom_crop(image: Tensor, ids: Tensor, crop_hw: tuple[int, int], zoom: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return seen(RandomZoomCrop(crop_hw, zoom)(Sample(image, ids)))


def noise(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, 7, 200], dtype=torch.uint8)[torch.randint(3, (height, width), generator=generator)]
    return ids.expand(3, -1, -1).contiguous(), ids


@pytest.mark.parametrize("seed", range(8))
def test_views_never_blend_ids(seed: int) -> None:
    image, ids = noise(40, 60)
    torch.manual_seed(seed)
    views = training_views((32, 48), (0.3, 3.0), flip=True, jitter=0.4, void=255)
    pixels, viewed = seen(views(Sample(image, ids)))
    assert pixels.shape == (3, 32, 48)
    assert viewed.shape == (32, 48)
    assert pixels.dtype == viewed.dtype == torch.uint8
    assert set(viewed.unique().tolist()) <= {3, 7, 200, 255}


def test_crop_without_zoom_is_a_window_of_the_image() -> None:
    image, ids = noise(40, 60)
    pixels, viewed = zoom_crop(image, ids, (16, 24), (1.0, 1.0))
    assert torch.equal(pixels[0], viewed)
    windows = ids.unfold(0, 16, 1).unfold(1, 24, 1)
    assert (windows == viewed).all(dim=(-1, -2)).any()


def test_crop_larger_than_the_image_shows_all_of_it_on_its_mean_and_void() -> None:
    image, ids = noise(10, 12)
    image[0] = 100
    pixels, viewed = zoom_crop(image, ids, (20, 20), (1.0, 1.0))
    inside = viewed != 255
    assert inside.sum() == ids.numel()
    assert torch.equal(viewed[inside], ids.flatten())
    assert (pixels[0] == 100).all()
    outside = pixels[1][~inside]
    assert (outside.float() - image[1].float().mean()).abs().max() <= 1


def test_zoom_keeps_image_and_ids_aligned() -> None:
    image, ids = noise(4, 4)
    pixels, viewed = zoom_crop(image, ids, (12, 12), (3.0, 3.0))
    centres = viewed[1::3, 1::3]
    assert torch.equal(centres, ids)
    assert torch.equal(pixels[0, 1::3, 1::3], ids)


def test_halving_takes_ids_from_the_centre_of_what_the_image_averages() -> None:
    ids = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
    _, viewed = zoom_crop(ids.expand(3, -1, -1), ids, (2, 2), (0.25, 0.25))
    assert viewed[0].tolist() == [2, 6]  # columns 0..3 and 4..7; NEAREST would take their first, 0 and 4


def test_same_key_same_view(tmp_path: Path) -> None:
    dataset = open_dataset(write_tiny(tmp_path))
    samples = DenseDataset(
        dataset, dataset.split("train"), {"semantic"}, training_views((32, 48), (0.5, 2.0), True, 0.4, 255)
    )
    before = torch.random.get_rng_state()
    first, again, other = (seen(samples[SampleKey(1, seed)]) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_memory_and_disk_give_the_same(tmp_path: Path) -> None:
    dataset = open_dataset(write_tiny(tmp_path))
    samples = DenseDataset(dataset, dataset.split("train"), {"semantic"})
    assert not samples.decode_all(limit_bytes=1000)
    read = seen(samples[SampleKey(3)])
    assert samples.decode_all(limit_bytes=1e6)
    kept = seen(samples[SampleKey(3)])
    assert torch.equal(read[0], kept[0])
    assert torch.equal(read[1], kept[1])
    assert pickle.loads(pickle.dumps(samples)).decoded is None


def test_collate_pads_right_and_bottom_with_void() -> None:
    images = [torch.full((3, 2, 5), 255, dtype=torch.uint8), torch.full((3, 4, 3), 51, dtype=torch.uint8)]
    batch = collate([Sample(image, torch.ones(image.shape[1:], dtype=torch.uint8)) for image in images])
    assert not isinstance(batch, InputError)
    images_batch, targets = batch
    target = targets.class_ids
    assert target is not None
    assert (targets.segments, targets.depth_m, targets.normals) == (None, None, None)
    assert images_batch.source_hw == ((2, 5), (4, 3))
    assert images_batch.pixels.shape == (2, 3, 4, 5)
    assert images_batch.pixels[1, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0, 0])
    assert images_batch.valid.sum(dim=(1, 2)).tolist() == [10, 12]
    assert torch.equal(target == 255, ~images_batch.valid)
    assert target.dtype == torch.int64


def test_error_in_a_worker_arrives_as_itself(tmp_path: Path) -> None:
    dataset = open_dataset(write_tiny(tmp_path))
    broken = dataset.split("val")[2].image
    broken.write_bytes(b"")
    loader = DataLoader(
        DenseDataset(dataset, dataset.split("val"), {"semantic"}),
        4,
        sampler=FixedSampler(4),
        num_workers=1,
        collate_fn=collate,
    )
    (batch,) = loader
    assert isinstance(batch, InputError)
    assert str(batch).startswith(f"{broken}:")
    assert "Traceback" not in str(batch)


def keys(sampler: EpochSampler) -> list[SampleKey]:
    return list(sampler)


def indices(sampled: Sequence[SampleKey]) -> list[int]:
    return sorted(key.index for key in sampled)


def test_epochs_differ_and_repeat() -> None:
    sampler = EpochSampler(10, seed=3)
    first = keys(sampler)
    sampler.set_epoch(1)
    second = keys(sampler)
    sampler.set_epoch(0)
    assert keys(sampler) == first
    assert second != first
    assert indices(first) == indices(second) == list(range(10))
    assert len({key.seed for key in first + second}) == 20


def test_ranks_share_an_epoch() -> None:
    parts = [keys(EpochSampler(10, 0, rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert set(indices([key for part in parts for key in part])) == set(range(10))
    assert sorted(key.index for rank in range(4) for key in FixedSampler(10, rank, 4)) == list(range(10))
    assert indices(keys(EpochSampler(2, 0, 2, 3))) != []


def test_skip_resumes_in_the_middle_of_one_epoch() -> None:
    sampler = EpochSampler(10, 0)
    whole = keys(sampler)
    sampler.skip = 4
    assert keys(sampler) == whole[4:]
    assert keys(sampler) == whole
    assert len(sampler) == 10


def test_views_of_camvid_hold_its_ids_only(camvid: Path) -> None:
    dataset = open_dataset(camvid)
    samples = DenseDataset(
        dataset, dataset.split("train")[:2], {"semantic"}, training_views((180, 240), (0.5, 2.0), True, 0.4, 255)
    )
    found: set[int] = set()
    for seed in range(6):
        found |= set(seen(samples[SampleKey(seed % 2, seed)])[1].unique().tolist())
    assert {0, 1, 3, 255} <= found <= {*range(11), 255}


def everything(height: int, width: int, seed: int = 0) -> Sample:
    """Every truth of a pixel follows from one number, so that whatever moves them apart shows."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randint(0, 5, (1, height, width), generator=generator, dtype=torch.int32)
    turn = layers[0].float()
    return Sample(
        (40 * layers).to(torch.uint8).expand(3, -1, -1).contiguous(),
        class_ids=layers[0].to(torch.uint8),
        layers=layers,
        segments=(*(Segment(i, i) for i in range(1, 4)), Segment(4, 4, is_crowd=True)),
        void=layers[0] == 4,
        depth_m=turn / 2,
        normals=torch.stack([torch.sin(turn), torch.cos(turn), torch.zeros_like(turn)]),
    )


def agreeing(sample: Sample, inside: Tensor) -> None:
    """Every truth still says the same of every pixel inside."""
    assert sample.layers is not None
    assert sample.class_ids is not None
    assert sample.depth_m is not None
    assert sample.void is not None
    ids = sample.layers[0]
    assert torch.equal(sample.class_ids[inside].int(), ids[inside])
    assert torch.equal(sample.depth_m[inside], ids[inside] / 2)
    assert torch.equal(sample.void[inside], ids[inside] == 4)


@pytest.mark.parametrize("zoom", [0.4, 1.0, 1.7])
def test_zoom_moves_all_truths_together(zoom: float) -> None:
    torch.manual_seed(1)
    sample = RandomZoomCrop((24, 20), (zoom, zoom))(everything(16, 30))
    assert sample.class_ids is not None
    assert sample.normals is not None
    assert sample.depth_m is not None
    inside = sample.class_ids != VOID
    agreeing(sample, inside)
    assert inside.any()
    assert (zoom > 1) or not inside.all()
    length = sample.normals.norm(dim=0)
    assert torch.equal(length > 0.5, inside), "outside the image normals are unknown, and nothing is blended"
    assert set(sample.depth_m.unique().tolist()) <= {0, 0.5, 1, 1.5, 2}, "depth stays in metres"


def test_mirroring_turns_normals_to_the_other_side() -> None:
    sample = everything(4, 5)
    views = [RandomFlip()(sample) for _ in range(20)]
    flipped = next(view for view in views if not torch.equal(view.image, sample.image))
    assert any(torch.equal(view.image, sample.image) for view in views)
    agreeing(flipped, torch.ones(4, 5, dtype=torch.bool))
    assert flipped.normals is not None
    assert sample.normals is not None
    assert torch.equal(flipped.image, sample.image.flip(-1))
    assert torch.equal(flipped.normals, sample.normals.flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None])


def test_quarter_turns_turn_normals() -> None:
    """A slope that falls to the right: after a quarter turn against the clock it falls upwards."""
    normals = torch.tensor([0.6, 0.0, -0.8])[:, None, None].expand(3, 2, 3)
    sample = Sample(torch.arange(18, dtype=torch.uint8).view(3, 2, 3), normals=normals)
    found: dict[tuple[int, ...], list[float]] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        view = RandomQuarterTurn()(sample)
        assert view.normals is not None
        found[(view.image.shape[1], int(view.image[0, 0, 0]))] = view.normals[:, 0, 0].tolist()
    expected = {(2, 0): [0.6, 0, -0.8], (3, 2): [0, -0.6, -0.8], (2, 5): [-0.6, 0, -0.8], (3, 3): [0, 0.6, -0.8]}
    assert found.keys() == expected.keys()
    for turned, normal in expected.items():
        assert found[turned] == pytest.approx(normal)


def test_long_side_keeps_the_aspect() -> None:
    sample = LongSide(60)(everything(16, 30))
    assert sample.hw == (32, 60)
    agreeing(sample, torch.ones(32, 60, dtype=torch.bool))


@pytest.mark.parametrize(("old", "new"), [(7, 3), (5, 11), (9, 9), (4, 8)])
def test_nearest_takes_the_pixel_whose_centre_is_nearest(old: int, new: int) -> None:
    plane = torch.arange(old, dtype=torch.float32).expand(1, 1, old, old)
    expected = torch.nn.functional.interpolate(plane, (new, new), mode="nearest-exact")[0, 0]
    assert torch.equal(nearest(plane[0, 0].int(), (new, new)), expected.int())


def test_pasting_cuts_what_lies_below() -> None:
    """Cat 1 lies on cat 2 of the other image; grass is stuff and stays there."""
    ids = torch.tensor([[[5, 5, 6, 6, 0]]], dtype=torch.int32)
    below = Sample(
        torch.zeros(3, 1, 5, dtype=torch.uint8),
        class_ids=torch.tensor([[0, 0, 1, 1, 255]], dtype=torch.uint8),
        layers=ids,
        segments=(Segment(5, 0), Segment(6, 1)),
        void=ids[0] == 0,
        depth_m=torch.ones(1, 5),
        normals=torch.ones(3, 1, 5),
    )
    layers = torch.tensor([[[9, 0, 3, 3, 7]]], dtype=torch.int32)
    above = Sample(
        torch.full((3, 1, 5), 200, dtype=torch.uint8),
        layers=layers,
        segments=(Segment(9, 1), Segment(3, 0), Segment(7, 0, is_crowd=True)),
    )
    torch.manual_seed(0)
    seen_layers: set[str] = set()
    for _ in range(12):
        sample = copy_paste(below, above, things=(0,))
        assert sample.layers is not None
        seen_layers.add(str(sample.layers.tolist()))
        if 6 in sample.layers:
            assert torch.equal(sample.layers, ids)
            assert torch.equal(sample.image, below.image)
            continue
        assert sample.layers.tolist() == [[[5, 5, 7, 7, 0]]]
        assert sample.segments == (Segment(5, 0), Segment(7, 0))
        assert sample.image[0, 0].tolist() == [0, 0, 200, 200, 0]
        assert sample.class_ids is not None
        assert sample.class_ids.tolist() == [[0, 0, 0, 0, 255]]
        assert sample.depth_m is not None
        assert sample.depth_m.tolist() == [[1, 1, 0, 0, 1]]
        assert sample.normals is not None
        assert sample.normals[2].tolist() == [[1, 1, 0, 0, 1]]
        assert sample.void is not None
        assert sample.void.tolist() == [[False, False, False, False, True]]
    assert len(seen_layers) == 2, "pasted or not, at random"


def test_targets_of_segments() -> None:
    """Segment 3 left the view, the crowd and the padding are void, background is not."""
    layers = torch.tensor([[[1, 1, 0]], [[0, 2, 4]]], dtype=torch.int32)
    segments = (Segment(2, 7), Segment(3, 7), Segment(1, 5), Segment(4, 7, is_crowd=True))
    one = Sample(torch.zeros(3, 1, 3, dtype=torch.uint8), layers=layers, segments=segments, void=layers[1] == 4)
    none = Sample(
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        layers=torch.zeros(1, 2, 2, dtype=torch.int32),
        void=torch.zeros(2, 2, dtype=torch.bool),
    )
    batch = collate([one, none])
    assert not isinstance(batch, InputError)
    assert batch[1].segments is not None
    first, second = batch[1].segments
    assert first.class_ids.tolist() == [7, 5]
    assert first.masks.tolist() == [
        [[False, True, False], [False] * 3],
        [[True, True, False], [False] * 3],
    ]
    assert first.void is not None
    assert first.void.tolist() == [[False, False, True], [True] * 3]
    assert second.masks.shape == (0, 2, 3)
    assert second.class_ids.dtype == torch.int64
    assert second.void is not None
    assert second.void.tolist() == [[False, False, True]] * 2


def test_targets_of_depth_and_normals() -> None:
    batch = collate([everything(2, 3), everything(3, 2)])
    assert not isinstance(batch, InputError)
    targets = batch[1]
    assert targets.depth_m is not None
    assert targets.normals is not None
    assert targets.depth_m.shape == (2, 3, 3)
    assert targets.normals.shape == (2, 3, 3, 3)
    assert not targets.depth_m[0, 2].any()
    assert not targets.normals[1, :, :, 2].any()


def test_a_rendered_street_with_every_truth(tmp_path: Path) -> None:
    write_scenes(tmp_path, 4, (48, 64))
    dataset = open_dataset(tmp_path)
    views = training_views((32, 32), (0.5, 2.0), True, 0.4, quarter_turns=True)
    samples = DenseDataset(dataset, dataset.split("train"), dataset.tasks, views, copy_paste=1.0)
    assert samples.decode_all(1e9)
    for seed in range(6):
        sample = samples[SampleKey(seed % len(samples), seed)]
        assert isinstance(sample, Sample)
        assert sample.hw == (32, 32)
        assert sample.layers is not None
        assert sample.class_ids is not None
        class_of = torch.full((int(sample.layers.max()) + 1,), VOID)
        for segment in sample.segments:
            class_of[segment.id] = segment.class_id
        known = sample.layers[0] > 0
        same = class_of[sample.layers[0].long()] == sample.class_ids
        assert same[known].float().mean() > 0.95, "an object has the class of most of its pixels"
    batch = collate([samples[SampleKey(i % len(samples), i)] for i in range(3)])
    assert not isinstance(batch, InputError)
    targets = batch[1]
    assert targets.segments is not None
    for number, of_image in enumerate(targets.segments):
        assert of_image.void is not None
        covered = of_image.masks.any(dim=0)
        assert torch.equal(covered, ~of_image.void), "in panoptic truth a pixel is of a segment or void"
        assert targets.class_ids is not None
        assert (targets.class_ids[number][covered] != VOID).float().mean() > 0.95


def test_what_pasting_needs(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, (32, 48))
    dataset = open_dataset(tmp_path / "scenes")
    items = dataset.split("train")
    with pytest.raises(InputError, match=r"copy_paste: wanted a task with segments \(instance, panoptic\), got depth"):
        DenseDataset(dataset, items, {"depth"}, copy_paste=0.5)
    samples = DenseDataset(dataset, items, {"instance"})
    with pytest.raises(InputError, match=r"copy_paste: wanted a probability in 0\.\.1, got 2"):
        samples.copy_paste = 2
    tiny = open_dataset(write_tiny(tmp_path / "tiny"))
    with pytest.raises(InputError, match=r"wanted truth for instance, got data with semantic only"):
        DenseDataset(tiny, tiny.split("train"), {"instance"})


def test_images_alone_are_padded() -> None:
    batch = pad_images([torch.full((3, 1, 2), 255, dtype=torch.uint8), torch.full((3, 2, 1), 51, dtype=torch.uint8)])
    assert batch.pixels[:, 0].tolist() == [[[1, 1], [0, 0]], [[pytest.approx(0.2), 0], [pytest.approx(0.2), 0]]]
    assert batch.valid.tolist() == [[[True, True], [False, False]], [[True, False], [True, False]]]
    assert batch.source_hw == ((1, 2), (2, 1))
