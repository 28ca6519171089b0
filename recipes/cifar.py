"""Train a small classifier in timm's own architecture on CIFAR-10: the testbeds of compression.

python recipes/cifar.py vit|swin [--minutes 60] [--work runs/cifar] [--threads 2]

Writes WORK/NAME as a folder that `timm.create_model("local-dir:...")` opens, and
benchmarks/results/proofs/cifar_NAME.json. Minutes are minutes of CPU time of all threads together. Training goes on
where it stopped if it was interrupted.
"""

import argparse
import json
import math
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from denselab import _vision as _vision  # isort: skip
import timm
from timm.layers import PatchDropout
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

from denselab.files import write_json

ROOT = Path(__file__).parents[1]
IMAGES = ROOT.parent / "shared" / "data" / "cifar10" / "cifar10_18k_jpeg.zip"
RESULTS = ROOT / "benchmarks" / "results" / "proofs"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, LEARNING_RATE, WARM_UP, LABEL_SMOOTHING, WEIGHT_DECAY, MOST_OFFSET_PX = 128, 2e-3, 0.05, 0.1, 0.05, 4
DROPPED_PATCHES, DROPPED_UNTIL = 0.5, 0.8

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 6}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 48,
            "depths": [2, 4, 2],
            "num_heads": [2, 4, 8],
        },
    ),
}


def read_split(split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and class ids [N] of "train" or "test", in order of name."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{split}/"))
        images = [np.asarray(Image.open(BytesIO(archive.read(name))).convert("RGB")) for name in names]
    classes = sorted({name.split("/")[1] for name in names})
    ids = [classes.index(name.split("/")[1]) for name in names]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(ids)


def normalised(images: Tensor) -> Tensor:
    """Images as the network takes them."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def moved(images: Tensor) -> Tensor:
    """Each image mirrored or not, and shifted by up to four pixels."""
    count, _, height, width = images.shape
    padded = F.pad(images, [MOST_OFFSET_PX] * 4, mode="reflect")
    rows = torch.randint(0, 2 * MOST_OFFSET_PX + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * MOST_OFFSET_PX + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def begin_like_trained(model: nn.Module) -> None:
    """Start a ViT where trained ones end up, which spares it many epochs on few images.

    Trockman & Kolter: Mimetic Initialization of Self-Attention Layers, ICML 2023, arXiv:2305.09828: W_q W_k^T near
    0.7 I, W_v W_proj near -0.4 I, positions as sines and cosines.
    """
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    for block in model.blocks:
        query, key, value = block.attn.qkv.weight.view(3, heads, dim // heads, dim)
        for head in range(heads):
            left, sizes, right = torch.linalg.svd(0.7 * torch.randn(dim, dim) / math.sqrt(dim) + 0.7 * torch.eye(dim))
            kept = dim // heads
            query[head] = (left[:, :kept] * sizes[:kept].sqrt()).T
            key[head] = sizes[:kept].sqrt()[:, None] * right[:kept]
        left, sizes, right = torch.linalg.svd(0.4 * torch.randn(dim, dim) / math.sqrt(dim) - 0.4 * torch.eye(dim))
        value.copy_((sizes.sqrt()[:, None] * right).view_as(value))
        block.attn.proj.weight.copy_(left * sizes.sqrt())
    side = math.isqrt(model.pos_embed.shape[1] - 1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [each.flatten()[:, None] * rates for each in (rows, columns)]
    model.pos_embed[0, 1:] = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, ids: Tensor) -> float:
    """Share of images whose class the model names."""
    model.eval()
    right = sum(
        int((model(normalised(pixels)).argmax(1) == wanted).sum())
        for pixels, wanted in zip(images.split(500), ids.split(500), strict=True)
    )
    return right / len(ids)


def train(name: str, minutes: float, work: Path) -> None:
    architecture, model_args = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10, **model_args)
    if name == "vit":
        begin_like_trained(model)
        model.patch_drop = PatchDropout(DROPPED_PATCHES)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = create_optimizer_v2(model, opt="muon", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    (images, ids), test = read_split("train"), read_split("test")
    state_file = work / f"{name}.pt"
    spent_s, step = 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        spent_s, step = state["spent_s"], state["step"]
    peak = [group["lr"] for group in optimizer.param_groups]
    begun_s, epoch = time.process_time() - spent_s, 0
    while (done := (time.process_time() - begun_s) / (60 * minutes)) < 1:
        model.train()
        for chosen in torch.randperm(len(ids)).split(BATCH):
            done = min((time.process_time() - begun_s) / (60 * minutes), 1)
            factor = min(done / WARM_UP, 1) * (1 + math.cos(math.pi * done)) / 2
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * factor
            if name == "vit" and done >= DROPPED_UNTIL:
                model.patch_drop = nn.Identity()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(normalised(moved(images[chosen])))
            loss = F.cross_entropy(logits.float(), ids[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            step += 1
            if done == 1:
                break
        epoch += 1
        print(f"{name} {done:.3f} epoch {epoch} step {step} loss {loss.item():.3f}", flush=True)
        if epoch % 2 == 0:
            print(f"    test {accuracy(average, *test):.4f}", flush=True)
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            partial = state_file.with_suffix(".part")
            torch.save({**state, "spent_s": time.process_time() - begun_s, "step": step}, partial)
            partial.replace(state_file)
    best = average.module.eval()
    best.pretrained_cfg.update(mean=MEAN, std=STD, input_size=(3, 32, 32), crop_pct=1.0, num_classes=10)
    save_for_hf(best, work / name, model_args={"num_classes": 10, **model_args}, safe_serialization=True)
    write_json(
        RESULTS / f"cifar_{name}.json",
        {
            "command": f"python recipes/cifar.py {name} --minutes {minutes:g}",
            "cpu_minutes": (time.process_time() - begun_s) / 60,
            "epochs": step * BATCH / len(ids),
            "parameters": sum(each.numel() for each in best.parameters()),
            "test_top1": accuracy(best, *test),
        },
    )
    print(json.dumps(json.loads((RESULTS / f"cifar_{name}.json").read_text("utf-8")), indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    train(given.name, given.minutes, given.work)
