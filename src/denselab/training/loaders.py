"""The batches of a run, shared out over processes."""

import torch
from torch.utils.data import DataLoader, Sampler

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.data.samples import EpochSampler, FixedSampler, SampleKey, SemanticDataset, collate
from denselab.training.options import FitOptions

# isort: split
from lightning.pytorch import LightningDataModule, Trainer


class Loaders(LightningDataModule):
    """Training crops in random order, validation images whole and in order."""

    def __init__(self, train: SemanticDataset, val: SemanticDataset, options: FitOptions) -> None:
        super().__init__()
        self.train, self.val, self.options = train, val, options

    def train_dataloader(self) -> DataLoader[object]:
        """Goes on in the middle of an epoch where the checkpoint was written there."""
        trainer = self._trainer()
        sampler = EpochSampler(len(self.train), self.options.seed, trainer.global_rank, trainer.world_size)
        batch = min(self.options.batch_size, len(sampler))
        steps_per_epoch = len(sampler) // batch
        sampler.skip = trainer.fit_loop.epoch_loop.batch_progress.current.ready % steps_per_epoch * batch
        return self._loader(self.train, sampler, batch, drop_last=True)

    def val_dataloader(self) -> DataLoader[object]:
        """Up to four images at a time: they are whole, and those of other sizes get padded."""
        trainer = self._trainer()
        sampler = FixedSampler(len(self.val), trainer.global_rank, trainer.world_size)
        return self._loader(self.val, sampler, min(4, self.options.batch_size), drop_last=False)

    def _trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    def _loader(
        self, dataset: SemanticDataset, sampler: Sampler[SampleKey], batch: int, drop_last: bool
    ) -> DataLoader[object]:
        workers = self.options.workers
        return DataLoader(
            dataset,
            batch_size=batch,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            drop_last=drop_last,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
