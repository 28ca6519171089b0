"""I-ViT on a trained network: integers alone, and about the accuracy of other 8-bit methods."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from denselab.compress.integer.program_onnx import ProgramFile, write_program
from denselab.compress.methods.i_vit import I_VIT, operand_scale
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observing import SiteStats, observe
from denselab.compress.plan import QuantPlan, equal_bits
from digits import reader

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_of(rows: Tensor) -> SiteStats:
    return SiteStats(None, 2, rows.amin(), rows.amax(), rows, len(rows))


def test_scales_by_hand() -> None:
    steps = torch.arange(-127.0, 128.0)
    assert operand_scale(seen_of(steps * 0.5)) == 0.5
    rare = torch.cat([steps.repeat(400) / 127, torch.tensor([1.6])])  # worth clipping beside 100000 others
    assert operand_scale(seen_of(rare)) < 1.3 / 127
    assert operand_scale(seen_of(torch.zeros(9))) > 0


def test_digits_are_still_read(tmp_path: Path) -> None:
    digits = reader()
    graph, some = digits.graph, digits.test[:200]
    calibration = Calibration((digits.seen,))
    stats = observe(graph, calibration.batches)
    program = I_VIT.quantize(graph, stats, calibration)
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 8, 8))
    by_min_max = digits.top1(MIN_MAX.quantize(graph, stats, plan, calibration).run)
    assert digits.top1(program.as_module()) >= by_min_max - 0.01
    with torch.no_grad():
        wanted, got = graph.run(some), program.as_module()(some)
    assert (got - wanted).norm() < 0.04 * wanted.norm()

    path = tmp_path / "digits.onnx"
    write_program(program, path)
    weights = sum(value.numel() for value in graph.module.parameters())
    assert path.stat().st_size < 4 * weights
    torch.testing.assert_close(ProgramFile(path, threads=1).as_module()(some), got, rtol=0, atol=0)
