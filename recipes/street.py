"""Train the built-in model `street` on CamVid train + val, on CPU cores, for a fixed time.

python recipes/street.py --data CAMVID --out runs/street --minutes 110 [--resume]

The learning rate and the crop size follow the share of the time that is spent, so a slower machine sees fewer
images and the same schedule. Every image stays in memory. The test split is read once, at the end, to score.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from denselab.checkpoint import KEY, ModelCard, note_score, save_atomically
from denselab.classes import STREET
from denselab.data.descriptor import open_dataset
from denselab.evaluate import evaluate
from denselab.export.torch_session import load_predictor
from denselab.losses.pixel import cross_entropy, dice, inverse_log_weights
from denselab.zoo import street

VOID = 255
LICENCE = "Weights: research use (CC BY-NC 4.0), as the CamVid images they were trained on"


@dataclass(frozen=True)
class Phase:
    """Until this share of the time is spent: crop size in px, zoom range, images per step."""

    until: float
    crop_hw: tuple[int, int]
    zoom: tuple[float, float]
    batch: int


@dataclass(frozen=True)
class Options:
    data: str
    out: str
    minutes: float
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    dice_weight: float = 0.5
    ema_decay: float = 0.999
    phases: tuple[Phase, ...] = (
        Phase(0.45, (192, 256), (0.4, 1.3), 12),
        Phase(0.85, (256, 352), (0.5, 1.8), 8),
        Phase(1.00, (320, 448), (0.6, 1.8), 6),
    )


def read_split(root: Path, split: str) -> tuple[list[Tensor], list[Tensor]]:
    """All images (uint8 [3, H, W]) and labels (uint8 [H, W], void 255) of a split."""
    images, labels = [], []
    for path in sorted((root / "images" / split).glob("*.jpg")):
        images.append(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous())
        ids = np.array(Image.open(root / "labels" / split / f"{path.stem}.png"))
        labels.append(torch.from_numpy(np.where(ids > 10, VOID, ids).astype(np.uint8)))
    return images, labels


def crop(image: Tensor, label: Tensor, phase: Phase, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One random zoom and crop with a random mirror; outside the image: mean grey and void."""
    zoom = float(np.exp(rng.uniform(*np.log(phase.zoom))))
    height, width = label.shape
    h, w = (round(side / zoom) for side in phase.crop_hw)
    top = int(rng.integers(min(0, height - h), max(0, height - h) + 1))
    left = int(rng.integers(min(0, width - w), max(0, width - w) + 1))
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
    pad = (x0 - left, left + w - x1, y0 - top, top + h - y1)
    pixels = F.pad(image[:, y0:y1, x0:x1].float(), pad, value=127.5)
    ids = F.pad(label[y0:y1, x0:x1], pad, value=VOID)
    pixels = F.interpolate(pixels[None], phase.crop_hw, mode="bilinear", antialias=zoom < 1)[0]
    ids = F.interpolate(ids[None, None], phase.crop_hw, mode="nearest-exact")[0, 0]
    if rng.random() < 0.5:
        pixels, ids = pixels.flip(-1), ids.flip(-1)
    return recolour(pixels / 255, rng), ids


def recolour(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Random gamma, gain per channel, contrast, saturation and noise; pixels in [0, 1]."""
    pixels = pixels.clamp(1e-4, 1) ** float(np.exp(rng.uniform(-0.4, 0.4)))
    pixels = pixels * torch.from_numpy(rng.uniform(0.85, 1.15, (3, 1, 1)).astype(np.float32)) * rng.uniform(0.75, 1.25)
    pixels = (pixels - pixels.mean()) * rng.uniform(0.7, 1.3) + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.4, 1.4)
    if rng.random() < 0.3:
        pixels = pixels + torch.randn(pixels.shape) * rng.uniform(0, 0.04)
    return pixels.clamp(0, 1)


class Crops(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of crops, every image once per pass."""

    def __init__(self, images: list[Tensor], labels: list[Tensor], phase: Phase, seed: int) -> None:
        self.images, self.labels, self.phase, self.seed = images, labels, phase, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        queue: list[int] = []
        while True:
            while len(queue) < self.phase.batch:
                queue += rng.permutation(len(self.images)).tolist()
            pairs = [crop(self.images[i], self.labels[i], self.phase, rng) for i in queue[: self.phase.batch]]
            queue = queue[self.phase.batch :]
            yield torch.stack([p for p, _ in pairs]), torch.stack([t for _, t in pairs]).long()


def main(options: Options, resume: bool) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "options.json").write_text(json.dumps(asdict(options), indent=2))
    root = Path(options.data)
    images, labels = (a + b for a, b in zip(read_split(root, "train"), read_split(root, "val"), strict=True))
    counts = torch.stack([torch.bincount(y.flatten().long(), minlength=256)[:11] for y in labels]).sum(0)
    class_weights = inverse_log_weights(counts.float())

    model = street(num_classes=11).to(memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(model).eval()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    spent, step, seen = 0.0, 0, 0
    if resume and (out / "last.pt").exists():
        state = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step, seen = state["spent"], state["step"], state["seen"]

    for phase in options.phases:
        if spent >= phase.until:
            continue
        loader = DataLoader(Crops(images, labels, phase, options.seed + step), None, num_workers=1, prefetch_factor=3)
        began, spent_before, logged, marked = time.monotonic(), spent, 0.0, step
        for pixels, target in loader:
            spent = spent_before + (time.monotonic() - began) / (60 * options.minutes)
            rate = options.learning_rate * min(1.0, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * min(spent, 1)))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                mask_logits = model(pixels.contiguous(memory_format=torch.channels_last)).mask_logits
            logits = F.interpolate(mask_logits.float(), size=target.shape[-2:], mode="bilinear")
            loss = cross_entropy(logits, target, VOID, class_weights)
            loss = loss + options.dice_weight * dice(logits, target, VOID)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step, seen = step + 1, seen + len(pixels)
            decay = min(options.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, now in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                    mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)
            if step % 200 == 0:
                pace = (time.monotonic() - began - logged) / max(1, step - marked)
                logged, marked = time.monotonic() - began, step
                print(
                    f"{spent:.4f} step {step} passes {seen / len(images):.1f} loss {loss.item():.4f} "
                    f"lr {rate:.2e} {len(pixels) / pace:.1f} images/s",
                    flush=True,
                )
                save(
                    out / "last.pt",
                    {
                        "model": model.state_dict(),
                        "averaged": averaged.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "spent": spent,
                        "step": step,
                        "seen": seen,
                    },
                )
            if spent >= phase.until:
                break
    print(f"{seen / len(images):.1f} passes over {len(images)} images", flush=True)
    checkpoint = out / "street.ckpt"
    card = ModelCard(("semantic",), "street", {}, STREET, train_hw=(360, 480), score=None, licence=LICENCE)
    weights = {f"averaged.model.{name}": tensor for name, tensor in averaged.state_dict().items()}
    save_atomically({KEY: card.to_dict(), "state_dict": weights}, checkpoint)
    evaluation = evaluate(load_predictor(checkpoint), open_dataset(root), "test")
    note_score(checkpoint, {"split": "test", **evaluation.headlines(), "images": evaluation.images})
    print(evaluation.to_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/street")
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    main(Options(given.data, given.out, given.minutes), given.resume)
