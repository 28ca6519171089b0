"""I-ViT on a trained network: integers alone, and about the accuracy of other 8-bit methods."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress_models import captured
from denselab.compress.fold_norms import fold_norms
from denselab.compress.integer.program_onnx import ProgramFile, write_program
from denselab.compress.methods.i_vit import I_VIT, operand_scale
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observe import SiteStats, observe
from denselab.compress.plan import QuantPlan, equal_bits
from test_compress_methods import CALIBRATION, DIGIT_SIDE_PX, digit_vit, digits, spread, trained

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
    pixels, labels = digits()
    model = trained(digit_vit(), pixels[:1300], labels[:1300], epochs=5, rate=5e-3)
    test, wanted = pixels[1300:1500], labels[1300:1500]

    def top1(network: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return (network(test).argmax(1) == wanted).double().mean().item()

    spread(model)
    graph = fold_norms(captured(model, side_px=DIGIT_SIDE_PX))
    calibration = Calibration((pixels[:CALIBRATION],))
    stats = observe(graph, calibration.batches)
    program = I_VIT.quantize(graph, stats, calibration)
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 8, 8))
    by_min_max = top1(MIN_MAX.quantize(graph, stats, plan, calibration).run)
    by_integers = top1(program.as_module())
    assert top1(model) > 0.7
    assert by_integers >= by_min_max - 0.01
    with torch.no_grad():
        wanted_logits, got = model(test), program.as_module()(test)
    assert (got - wanted_logits).norm() < 0.04 * wanted_logits.norm()

    path = tmp_path / "digits.onnx"
    write_program(program, path)
    weights = sum(value.numel() for value in model.parameters())
    assert path.stat().st_size < 4 * weights
    torch.testing.assert_close(ProgramFile(path, threads=1).as_module()(test), got, rtol=0, atol=0)
