"""The batches of a run, shared out over processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.data.samples import DenseDataset, EpochSampler, FixedSampler, SampleKey, collate, pad_images
from denselab.data.truth import Truth
from denselab.errors import InputError
from denselab.training.options import FitOptions
from denselab.types import ImageBatch

# isort: split
from lightning.pytorch import LightningDataModule, Trainer


class WholeImages(TorchDataset[Any]):
    """Images [H, W, 3] with their whole truth, for validation; an InputError takes the place of one that is broken."""

    def __init__(self, dataset: DenseDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """How many images."""
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[NDArray[np.uint8], Truth] | InputError:
        """Image and truth."""
        try:
            return self.dataset.read(key.index)
        except InputError as error:
            return error


def whole_images(
    items: Sequence[tuple[NDArray[np.uint8], Truth] | InputError],
) -> tuple[ImageBatch, tuple[Truth, ...]] | InputError:
    """Images padded to the largest, and their truths as they are; an InputError takes the place of the batch."""
    good: list[tuple[NDArray[np.uint8], Truth]] = []
    for item in items:
        if isinstance(item, InputError):
            return item
        good.append(item)
    images = pad_images([torch.from_numpy(image).permute(2, 0, 1) for image, _ in good])
    return images, tuple(truth for _, truth in good)


class Loaders(LightningDataModule):
    """Training crops in random order, validation images whole and in order."""

    def __init__(self, train: DenseDataset, val: DenseDataset, options: FitOptions) -> None:
        super().__init__()
        self.train, self.val, self.options = train, val, options

    def train_dataloader(self) -> DataLoader[object]:
        """Goes on in the middle of an epoch where the checkpoint was written there."""
        trainer = self._trainer()
        sampler = EpochSampler(len(self.train), self.options.seed, trainer.global_rank, trainer.world_size)
        batch = min(self.options.batch_size, len(sampler))
        steps_per_epoch = len(sampler) // batch
        sampler.skip = trainer.fit_loop.epoch_loop.batch_progress.current.ready % steps_per_epoch * batch
        return self._loader(self.train, sampler, batch, collate, drop_last=True)

    def val_dataloader(self) -> DataLoader[object]:
        """Up to four images at a time: they are whole, and those of other sizes get padded."""
        trainer = self._trainer()
        sampler = FixedSampler(len(self.val), trainer.global_rank, trainer.world_size)
        return self._loader(WholeImages(self.val), sampler, min(4, self.options.batch_size), whole_images)

    def _trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    def _loader(
        self,
        dataset: TorchDataset[Any],
        sampler: Sampler[SampleKey],
        batch: int,
        collate_fn: Callable[[list[Any]], Any],
        drop_last: bool = False,
    ) -> DataLoader[object]:
        workers = self.options.workers
        return DataLoader(
            dataset,
            batch_size=batch,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate_fn,
            drop_last=drop_last,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
