"""Images and truths of a data set as torch batches."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from denselab.classes import VOID
from denselab.data.augment import View
from denselab.data.copy_paste import copy_paste
from denselab.data.dataset import Dataset, Item
from denselab.data.sample import Sample as Sample
from denselab.data.truth import SEGMENT_TASKS, Truth
from denselab.errors import InputError
from denselab.types import ImageBatch, SegmentTargets, Targets

Known = tuple[NDArray[np.uint8], Truth]


@dataclass(frozen=True)
class SampleKey:
    """Which image, and the seed of its random view."""

    index: int
    seed: int = 0


class DenseDataset(TorchDataset["Sample | InputError"]):
    """One split of a data set, the truth of some tasks only, with random views of it if `views` is given.

    copy_paste: the probability that objects of another image, seen through its own random view, are pasted onto a
    sample; needs instance or panoptic truth, and views of one size. A file that cannot be used gives its InputError as
    the sample: raised in a worker, its text would reach the user inside the worker's traceback. Raises InputError for
    tasks that the data hold no truth of.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        tasks: Collection[str],
        views: View | None = None,
        copy_paste: float = 0.0,
    ) -> None:
        dataset.require(tasks)
        self.dataset, self.items, self.tasks, self.views = dataset, tuple(items), frozenset(tasks), views
        self.copy_paste = copy_paste
        self.decoded: list[Known] | None = None

    @property
    def copy_paste(self) -> float:
        """The probability that objects are pasted onto a sample; setting it raises InputError where none can be."""
        return self._copy_paste

    @copy_paste.setter
    def copy_paste(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"copy_paste: wanted a probability in 0..1, got {probability}")
        if probability and not SEGMENT_TASKS & self.tasks:
            given = ", ".join(sorted(self.tasks))
            raise InputError(f"copy_paste: wanted a task with segments (instance, panoptic), got {given}; set it to 0")
        self._copy_paste = probability

    def __len__(self) -> int:
        """How many images."""
        return len(self.items)

    def __getitem__(self, key: SampleKey) -> "Sample | InputError":
        """The sample of an index; the same key gives the same view in any process."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key.seed)
                return self._view(key.index)
        except InputError as error:
            return error

    def read(self, index: int) -> Known:
        """Image [H, W, 3] and truth, decoded now or before. Raises InputError."""
        return self.decoded[index] if self.decoded else self.dataset.read(self.items[index], self.tasks)

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a spawned worker reads its own; a forked one shares them."""
        return self.__dict__ | {"decoded": None}

    def decode_all(self, limit_bytes: float) -> bool:
        """Keep every decoded image in memory if they seem to fit, judged by the first. Raises InputError."""
        first = self.read(0)
        if len(self) * _bytes_of(first) > limit_bytes:
            return False
        self.decoded = [first, *(self.dataset.read(item, self.tasks) for item in self.items[1:])]
        return True

    def _view(self, index: int) -> Sample:
        sample = to_sample(*self.read(index))
        if self.views is None:
            return sample
        sample = self.views(sample)
        if not self.copy_paste or torch.rand(()) >= self.copy_paste:
            return sample
        source = self.views(to_sample(*self.read(int(torch.randint(len(self), ())))))
        if source.hw != sample.hw:
            raise InputError(
                f"copy_paste: wanted views of one size, got {list(sample.hw)} and {list(source.hw)}; "
                "crop them to a fixed size"
            )
        return copy_paste(sample, source, self.dataset.classes.things if self.dataset.classes else ())


def to_sample(image: NDArray[np.uint8], truth: Truth) -> Sample:
    """Arrays as tensors that share their memory; channels first."""
    return Sample(
        torch.from_numpy(image).permute(2, 0, 1),
        class_ids=None if truth.class_ids is None else torch.from_numpy(truth.class_ids),
        layers=None if truth.segments is None else torch.from_numpy(truth.segments.layers),
        segments=() if truth.segments is None else truth.segments.segments,
        void=None if truth.void is None else torch.from_numpy(truth.void),
        depth_m=None if truth.depth_m is None else torch.from_numpy(truth.depth_m),
        normals=None if truth.normals is None else torch.from_numpy(truth.normals).permute(2, 0, 1),
    )


def collate(samples: "Sequence[Sample | InputError]") -> "tuple[ImageBatch, Targets] | InputError":
    """Images padded as by `pad_images`, and their targets; padding is void and unknown.

    Masks are made here, after views: one per segment that has pixels and is no crowd; crowds and what else is void are
    in `SegmentTargets.void`. An InputError among the samples takes the place of the batch.
    """
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        good.append(sample)
    images = pad_images([sample.image for sample in good])
    height, width = images.valid.shape[1:]
    paddings = [(0, width - w, 0, height - h) for h, w in images.source_hw]

    def stacked(planes: Sequence[Tensor | None], fill: int) -> Tensor | None:
        padded = [F.pad(p, padding, value=fill) for p, padding in zip(planes, paddings, strict=True) if p is not None]
        return torch.stack(padded) if padded else None

    class_ids = stacked([sample.class_ids for sample in good], VOID)
    has_segments = good[0].layers is not None
    targets = Targets(
        class_ids=None if class_ids is None else class_ids.long(),
        segments=tuple(map(_segment_targets, good, paddings)) if has_segments else None,
        depth_m=stacked([sample.depth_m for sample in good], 0),
        normals=stacked([sample.normals for sample in good], 0),
    )
    return images, targets


def pad_images(images: Sequence[UInt8[Tensor, "3 _ _"]]) -> ImageBatch:
    """Images padded right and bottom to the largest height and width among them."""
    sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels = torch.zeros((len(sizes), 3, height, width))
    valid = torch.zeros((len(sizes), height, width), dtype=torch.bool)
    for index, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        pixels[index, :, :h, :w] = image
        valid[index, :h, :w] = True
    return ImageBatch(pixels / 255, valid, sizes)


def _segment_targets(sample: Sample, padding: tuple[int, int, int, int]) -> SegmentTargets:
    """Masks of the segments that are left in a view."""
    assert sample.layers is not None
    assert sample.void is not None
    layers = F.pad(sample.layers, padding)
    seen = set(layers.unique().tolist())
    kept = [segment for segment in sample.segments if segment.id in seen and not segment.is_crowd]
    ids = torch.tensor([segment.id for segment in kept], dtype=layers.dtype)
    masks = (layers == ids[:, None, None, None]).any(dim=1)
    class_ids = torch.tensor([segment.class_id for segment in kept], dtype=torch.int64)
    return SegmentTargets(masks, class_ids, F.pad(sample.void, padding, value=True))


def _bytes_of(known: Known) -> int:
    image, truth = known
    arrays = (truth.class_ids, truth.segments and truth.segments.layers, truth.depth_m, truth.normals, truth.void)
    return image.nbytes + sum(array.nbytes for array in arrays if array is not None)


class EpochSampler(Sampler[SampleKey]):
    """Every image once per epoch, shared out over processes; order and seeds follow from (seed, epoch) alone.

    Each of `ranks` processes gets equally many: the first images of the order fill up the last share.
    `skip` of its own are passed over in the next epoch only, to resume in the middle of one.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.length, self.seed, self.rank, self.ranks = length, seed, rank, ranks
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """How many images this process sees in an epoch."""
        return -(-self.length // self.ranks)

    def __iter__(self) -> Iterator[SampleKey]:
        """The keys of this process in this epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.resize(rng.permutation(self.length), len(self) * self.ranks)
        seeds = rng.integers(2**62, size=len(order))
        skip, self.skip = self.skip, 0
        for place in range(self.rank, len(order), self.ranks)[skip:]:
            yield SampleKey(int(order[place]), int(seeds[place]))


class FixedSampler(Sampler[SampleKey]):
    """Every image in order, every process its own, none twice: for validation."""

    def __init__(self, length: int, rank: int = 0, ranks: int = 1) -> None:
        self.indices = range(rank, length, ranks)

    def __len__(self) -> int:
        """How many images this process sees."""
        return len(self.indices)

    def __iter__(self) -> Iterator[SampleKey]:
        """The keys of this process."""
        return (SampleKey(index) for index in self.indices)
