"""Images and labels of a data set as torch batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from denselab import _vision as _vision  # makes torchvision importable beside a CPU torch
from denselab.classes import VOID
from denselab.data.descriptor import Dataset, read_pair
from denselab.data.folder import Pair
from denselab.errors import InputError
from denselab.types import ImageBatch

# isort: split
from torchvision import tv_tensors

Views = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]
Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class SampleKey:
    """Which image, and the seed of its random view."""

    index: int
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """image: uint8 [3, H, W]; class_ids: uint8 [H, W], void 255."""

    image: Tensor
    class_ids: Tensor


class SemanticDataset(TorchDataset["Sample | InputError"]):
    """One split of a data set, with random views of it if `views` is given.

    A file that cannot be used gives its InputError as the sample: raised in a worker, its text would reach the user
    inside the worker's traceback.
    """

    def __init__(self, dataset: Dataset, pairs: Sequence[Pair], views: Views | None = None) -> None:
        self.dataset, self.pairs, self.views = dataset, tuple(pairs), views
        self.decoded: list[Arrays] | None = None

    def __len__(self) -> int:
        """How many images."""
        return len(self.pairs)

    def __getitem__(self, key: SampleKey) -> "Sample | InputError":
        """The sample of an index; the same key gives the same view in any process."""
        try:
            image, class_ids = self.read(key.index)
        except InputError as error:
            return error
        pixels = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        ids = tv_tensors.Mask(torch.from_numpy(class_ids))
        if self.views is None:
            return Sample(pixels.as_subclass(Tensor), ids.as_subclass(Tensor))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key.seed)
            viewed_pixels, viewed_ids = self.views(pixels, ids)
        return Sample(viewed_pixels.as_subclass(Tensor), viewed_ids.as_subclass(Tensor))

    def read(self, index: int) -> Arrays:
        """Image [H, W, 3] and class ids [H, W], decoded now or before. Raises InputError."""
        return self.decoded[index] if self.decoded else read_pair(self.pairs[index], self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images: a spawned worker reads its own; a forked one shares them."""
        return self.__dict__ | {"decoded": None}

    def decode_all(self, limit_bytes: float) -> bool:
        """Keep every decoded image in memory if they seem to fit, judged by the first. Raises InputError."""
        first = read_pair(self.pairs[0], self.dataset)
        if len(self) * sum(array.nbytes for array in first) > limit_bytes:
            return False
        self.decoded = [first, *(read_pair(pair, self.dataset) for pair in self.pairs[1:])]
        return True


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


def collate(samples: "Sequence[Sample | InputError]") -> "tuple[ImageBatch, Tensor] | InputError":
    """Images padded right and bottom to the largest, and target int64 [B, H, W] padded with void.

    An InputError among the samples takes the place of the batch.
    """
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        good.append(sample)
    sizes = tuple((sample.class_ids.shape[0], sample.class_ids.shape[1]) for sample in good)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    paddings = [(0, width - w, 0, height - h) for h, w in sizes]
    pixels = torch.stack([F.pad(s.image, padding) for s, padding in zip(good, paddings, strict=True)]).float() / 255
    target = torch.stack([F.pad(s.class_ids, p, value=VOID) for s, p in zip(good, paddings, strict=True)]).long()
    valid = torch.zeros(target.shape, dtype=torch.bool)
    for mask, (h, w) in zip(valid, sizes, strict=True):
        mask[:h, :w] = True
    return ImageBatch(pixels, valid, sizes), target
