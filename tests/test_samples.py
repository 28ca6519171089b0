"""Samples and their random views: exact labels, reproducible, padded as announced."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from denselab.data.augment import RandomZoomCrop, training_views
from denselab.data.descriptor import open_dataset
from denselab.data.samples import DenseDataset, EpochSampler, FixedSampler, Sample, SampleKey, collate
from denselab.errors import InputError
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
