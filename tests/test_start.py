"""Weights to start from: what fits is copied, and a folded batch norm comes back with the same effect."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from denselab import load
from denselab._packaged import PACKAGED
from denselab.checkpoint import KEY, ModelCard, save_atomically
from denselab.classes import STREET, Classes
from denselab.data.scenes import render_scene
from denselab.errors import InputError
from denselab.results import SemanticMap
from denselab.tasks.task import make_task
from denselab.training.start import folded_convolutions, start_from
from denselab.types import HeadSpec
from denselab.zoo import build

CARD = ModelCard(("semantic",), "small", {}, Classes.named(("a", "b", "c")), None, None, "")


def pixels_of(seeds: range) -> torch.Tensor:
    photos = [render_scene(seed, (96, 128)).image for seed in seeds]
    return torch.stack([torch.tensor(photo).permute(2, 0, 1) / 255 for photo in photos])


def saved(card: ModelCard, path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = card.build().state_dict()
    save_atomically({KEY: card.to_dict(), "state_dict": {f"averaged.model.{n}": t for n, t in state.items()}}, path)
    return state


def test_the_built_in_model_says_the_same_after_its_batch_norms_came_back() -> None:
    torch.manual_seed(0)
    model, pixels = build("street", ("semantic",), len(STREET)), pixels_of(range(4))
    assert start_from(model, "street", pixels) == "starts from street: 56 of its 56 tensors fit"
    task, artifact = make_task("semantic", STREET), load("street")
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            answers = task.decode(model(pixels), cast("HeadSpec", model.spec), (96, 128))[0]
        for seed, answer in enumerate(answers):
            told = artifact(render_scene(seed, (96, 128)).image)
            assert isinstance(told, SemanticMap)
            agree = np.mean(answer.numpy() == told.class_ids)
            assert agree > (0.9 if training else 0.97)  # the artifact's activations are integers


def test_a_folded_weight_is_scale_times_integer() -> None:
    folded = folded_convolutions(PACKAGED["street"])
    weight = folded["backbone.stages.0.0.conv1.0.weight"]
    steps = weight / weight.abs().amax(dim=(1, 2, 3), keepdim=True) * 127
    assert weight.shape == (64, 64, 3, 3)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert folded["backbone.stages.0.0.conv1.0.bias"].shape == (64,)
    assert folded["head.classify.bias"].shape == (11,)


def test_what_a_checkpoint_shares_is_copied_and_the_rest_left(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    state = saved(CARD, path)
    torch.manual_seed(6)
    model = build("small", ("semantic",), 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    note = start_from(model, str(path), torch.zeros(1, 3, 32, 32))
    assert note == f"starts from {path}: {len(state) - 2} of its {len(state)} tensors fit"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.classify") else state[name]), name


def test_nothing_that_fits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    saved(CARD, path)
    with pytest.raises(InputError, match=r"start: wanted a model that shares weights .*got .*best\.ckpt"):
        start_from(build("lraspp", ("semantic",), 4, {"backbone": "vit_tiny_patch16_224"}), str(path), torch.zeros(1))
    with pytest.raises(InputError, match="wanted a checkpoint, got no such file"):
        start_from(build("small", ("semantic",), 4), str(tmp_path / "none.ckpt"), torch.zeros(1))
