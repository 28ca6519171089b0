"""A run learns, stops, resumes and keeps its word on tiny data."""

import csv
import errno
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from denselab import zoo
from denselab.checkpoint import KEY, ModelCard, load_checkpoint, save_atomically
from denselab.classes import STREET
from denselab.data.augment import training_views
from denselab.data.descriptor import open_dataset
from denselab.data.samples import DenseDataset, SampleKey, collate
from denselab.data.scenes import write_scenes
from denselab.errors import InputError
from denselab.evaluate import Evaluation
from denselab.tasks.task import make_task
from denselab.training.ema import AveragedModel
from denselab.training.fit import fit
from denselab.training.module import DenseModule, learning_rate
from denselab.training.options import ClassWeighting, Decay, FitOptions, Precision
from tiny_data import NAMES, write_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def tiny_options(data: Path, out: Path, **changes: Any) -> FitOptions:
    """Few steps of the smallest model, exact in fp32 and without workers."""
    values: dict[str, Any] = {
        "model": "small",
        "epochs": 2,
        "batch_size": 4,
        "lr": 5e-3,
        "zoom_min": 1.0,
        "zoom_max": 1.0,
        "ema_decay": 0.9,
        "precision": Precision.FP32,
        "devices": 1,
        "workers": 0,
        "picture_epochs": 0,
    }
    return FitOptions(data=str(data), out=str(out), **values | changes)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during that training step."""
    taken = DenseModule.training_step

    def training_step(self: DenseModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(self, batch, batch_idx)

    monkeypatch.setattr(DenseModule, "training_step", training_step)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save_mask(path: Path, size: tuple[int, int], class_id: int) -> None:
    Image.new("L", size, class_id).save(path)


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_learns_in_seconds_and_leaves_everything_behind(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    evaluation = fit(
        tiny_options(tiny, run, epochs=12, workers=1, picture_epochs=5, class_weights=ClassWeighting.INVERSE_LOG)
    )
    assert isinstance(evaluation, Evaluation)
    assert evaluation.figures["semantic"].miou > 0.9
    assert (evaluation.split, evaluation.images) == ("val", 4)

    written = json.loads((run / "evaluation.json").read_text())
    assert written["miou"] == pytest.approx(evaluation.figures["semantic"].miou)
    rows = read_rows(run / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 3
    assert float(rows[-1]["val_iou/sky"]) > 0.9
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [f"epoch_{n:04d}.png" for n in (1, 5, 10, 12)]
    with Image.open(run / "pictures" / "epoch_0010.png") as picture:
        assert picture.width > 900
    assert list((run / "tensorboard").glob("events*"))
    said = capsys.readouterr()
    assert "8 images to train, 4 to validate" in said.out
    assert "epoch 12/12  loss 0." in said.err
    assert "val mIoU 0.9" in said.err

    loaded = load_checkpoint(run / "best.ckpt")
    assert loaded.card.classes.names == NAMES
    assert not loaded.model.training
    assert loaded.card.train_hw == (64, 96)
    assert loaded.card.score == {"split": "val", "mIoU": evaluation.figures["semantic"].miou, "images": 4}
    state = weights(run / "best.ckpt")
    assert torch.equal(loaded.model.head.classify.weight, state["averaged.model.head.classify.weight"])


def test_same_seed_same_run_another_seed_another(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(tiny_options(tiny, tmp_path / name, epochs=1, seed=seed))
    first, same, other = (weights(tmp_path / name / "last.ckpt") for name in "abc")
    assert all(torch.equal(first[key], same[key]) for key in first if isinstance(first[key], torch.Tensor))
    assert not torch.equal(first["model.head.classify.weight"], other["model.head.classify.weight"])


@pytest.mark.parametrize("step", [2, 3])
def test_ctrl_c_saves_and_resume_repeats_the_uninterrupted_run(
    step: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps an epoch: step 2 ends an epoch, step 3 is in the middle of one."""
    fit(tiny_options(tiny, tmp_path / "whole", epochs=3))
    parts = tiny_options(tiny, tmp_path / "parts", epochs=3)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        assert fit(parts) is None
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"denselab fit -o {tmp_path / 'parts'} --resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["global_step"] == step

    assert fit(parts, resume=True) is not None
    whole, resumed = weights(tmp_path / "whole" / "last.ckpt"), weights(tmp_path / "parts" / "last.ckpt")
    assert whole["averaged._extra_state"] == resumed["averaged._extra_state"] == 6
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(resumed[key], value, rtol=0, atol=1e-6, msg=key)
    rows = read_rows(tmp_path / "parts" / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]


def test_resume_of_a_finished_run_can_go_on_longer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_options(tiny, tmp_path / "run", epochs=1)
    fit(options)
    assert "nothing left to train" not in capsys.readouterr().out
    fit(options, resume=True)
    assert "nothing left to train; raise --epochs" in capsys.readouterr().out
    fit(replace(options, max_time="1"), resume=True)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
    fit(replace(options, epochs=2), resume=True)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_time_ends_a_run_without_epochs(tiny: Path, tmp_path: Path) -> None:
    clock = partial(next, iter(range(0, 10_000, 2)))
    evaluation = fit(tiny_options(tiny, tmp_path / "run", epochs=None, max_time="00:00:20"), clock=clock)
    assert evaluation is not None
    contents = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert contents["callbacks"]["Pace"]["spent_s"] >= 20
    assert 1 <= contents["global_step"] <= 10
    again = tiny_options(tiny, tmp_path / "run", epochs=None, max_time="00:00:20")
    assert fit(again, resume=True, clock=clock) is not None
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == contents["global_step"]
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["lr"]) < 5e-3


def test_mixed_sizes_and_a_test_split(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", {"train": 4, "val": 3, "test": 2}, sizes=((64, 96), (48, 80)))
    evaluation = fit(tiny_options(data, tmp_path / "run", epochs=1, cache_mb=0, crop="64x48", precision=Precision.BF16))
    assert evaluation is not None
    assert (evaluation.split, evaluation.images) == ("test", 2)


def test_broken_image_met_in_a_worker_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", {"train": 8, "val": 4})
    broken = data / "images" / "train" / "006.png"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(InputError) as caught:
        fit(tiny_options(data, tmp_path / "run", cache_mb=0, workers=1))
    assert str(broken) in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda data: Image.new("L", (20, 20)).save(data / "masks" / "val" / "001.png"),
            r"001.png: wanted the size .*20x20",
        ),
        (
            lambda data: Image.new("L", (96, 64), 7).save(data / "masks" / "train" / "003.png"),
            r"003.png: wanted .*got ids 7",
        ),
        (lambda data: [path.unlink() for path in (data / "images" / "train").iterdir()], "none in train"),
    ],
)
def test_bad_data_is_refused_before_training(spoil: Any, text: str, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data")
    spoil(data)
    with pytest.raises(InputError, match=text):
        fit(tiny_options(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_run_folder_is_not_overwritten_unasked(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files; go on with --resume, start again with --overwrite"):
        fit(tiny_options(tiny, run))
    (run / "best.ckpt").write_text("old")
    fit(tiny_options(tiny, run, epochs=1), overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert load_checkpoint(run / "best.ckpt").card.classes.names == NAMES


def test_resume_refuses_another_model_or_other_classes(tiny: Path, tmp_path: Path) -> None:
    options = tiny_options(tiny, tmp_path / "run", epochs=1)
    fit(options)
    with pytest.raises(InputError, match="model is small, got street; a resumed run keeps its model"):
        fit(replace(options, model="street"), resume=True)
    other = write_tiny(tmp_path / "other", names=("sky", "ground", "box"))
    with pytest.raises(InputError, match="trained for the classes sky, ground, block, the data has sky, ground, box"):
        fit(replace(options, data=str(other)), resume=True)
    with pytest.raises(InputError, match=r"wanted a run to resume, got a folder without run\.yaml"):
        fit(replace(options, out=str(tmp_path / "elsewhere")), resume=True)


def test_diverging_run_says_so(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the loss became nan by step \d+; lower --lr"):
        fit(tiny_options(tiny, tmp_path / "run", lr=1e30, epochs=9))


def test_models_that_need_two_images_per_step_say_so(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch_size: deeplabv3 .* at least 2 images per step, got 1"):
        fit(tiny_options(tiny, tmp_path / "run", model="deeplabv3", backbone="resnet18", batch_size=1))


def test_loss_of_pixels_for_a_model_of_masks_is_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", 4, (32, 48))
    options = tiny_options(
        tmp_path / "data", tmp_path / "run", task="panoptic", model="mask2former", width=16, loss="ce+dice"
    )
    with pytest.raises(InputError, match="loss: wanted none for mask2former, whose masks have losses of their own"):
        fit(options)


def test_weights_of_tasks_multiply_their_losses(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", 4, (32, 48))
    dataset = open_dataset(tmp_path / "data")
    tasks = ("semantic", "depth")
    samples = DenseDataset(dataset, dataset.split("train"), tasks, training_views((32, 48), (1.0, 1.0), False, 0.0))
    batch = collate([samples[SampleKey(index, 0)] for index in range(2)])
    model = zoo.build("dpt", tasks, len(STREET), {"backbone": "street", "width": 16}).eval()
    card = ModelCard(tasks, "dpt", {}, STREET, (32, 48), None, "")

    def loss(task: str) -> float:
        options = FitOptions(data="d", out="o", task=task)
        made = tuple(make_task(name, STREET) for name in options.tasks)
        return DenseModule(model, card, options, made).training_step(batch, 0).item()

    semantic, depth = loss("semantic+0*depth"), loss("0*semantic+depth")
    assert min(semantic, depth) > 0
    assert loss("semantic+depth") == pytest.approx(semantic + depth, rel=1e-5)
    assert loss("0.5*semantic+3*depth") == pytest.approx(0.5 * semantic + 3 * depth, rel=1e-5)


def test_average_follows_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.constant_(model[0].weight, 0.0)
    averaged = AveragedModel(model, decay=0.5)
    nn.init.constant_(model[0].weight, 11.0)
    model[1].num_batches_tracked += 3
    averaged.update(model)  # decay (1 + 1) / (10 + 1)
    assert averaged.model[0].weight.item() == pytest.approx(9.0)
    assert averaged.model[1].num_batches_tracked == 3
    for _ in range(20):
        averaged.update(model)  # decay grows to 0.5
    assert averaged.model[0].weight.item() == pytest.approx(11.0, abs=1e-3)
    assert not any(p.requires_grad for p in averaged.parameters())
    again = AveragedModel(model, decay=0.5)
    again.load_state_dict(averaged.state_dict())
    assert again.steps == 21


def test_learning_rate_by_hand() -> None:
    options = FitOptions(data="d", out="o", lr=1.0, warmup_steps=9)
    assert learning_rate(options, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(options, 4, 0.0) == pytest.approx(0.5)
    assert learning_rate(options, 100, 0.5) == pytest.approx(0.5)
    assert learning_rate(options, 100, 1.2) == 0
    assert learning_rate(replace(options, decay=Decay.POLY), 100, 0.5) == pytest.approx(math.pow(0.5, 0.9))
    short = replace(options, warmup_steps=1000)
    assert learning_rate(short, 1, 0.1) == pytest.approx((1 + math.cos(0.1 * math.pi)) / 2)


def test_card_survives_as_plain_data(tmp_path: Path) -> None:
    card = ModelCard(("semantic",), "small", {"width": 8}, STREET, (32, 48), {"mIoU": 0.5}, "CC0-1.0")
    save_atomically({KEY: card.to_dict()}, tmp_path / "x.ckpt")
    assert ModelCard.from_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)[KEY]) == card


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        (None, "got no such file"),
        (b"", "got a file torch cannot load"),
        (b"PK\x03\x04 half", "got a file torch cannot load"),
        ({"state_dict": {}}, "got one without the key 'denselab'"),
        ({"evil": np.array}, "got a file torch cannot load"),
    ],
)
def test_what_is_no_checkpoint_is_named(contents: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(InputError, match=text) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: wanted a checkpoint")


def test_full_disk_is_named_and_what_was_saved_stays(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def save_twice(contents: dict[str, Any], file: Any) -> None:
        if contents["global_step"] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(contents, file)

    monkeypatch.setattr(torch, "save", save_twice)
    with pytest.raises(InputError, match=r"run: the disk is full; free some space and go on with --resume"):
        fit(tiny_options(tiny, tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "best.ckpt").card.classes.names == NAMES
    assert weights(tmp_path / "run" / "last.ckpt")


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_atomically({"step": 1}, path)
    with pytest.raises(AttributeError):
        save_atomically({"step": 2, "bad": lambda: 0}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
