"""Parsing Covering (Yang et al. 2019, "DeeperLab", arXiv:1902.05093, section 4): how well predicted regions cover.

For class c, Cov_c = sum over true regions R of |R| * max over predicted regions R' of class c of IoU(R, R'), divided by
the sum of |R|; PC is its mean over the classes in the truth. There is no matching threshold, and large regions weigh
more. As in tensorflow/models deeplab/evaluation/parsing_covering.py, |R| is the share of its image (so that photos of
all sizes weigh alike) and predictions lose what lies on void truth. That code knows no crowds; here they are void.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.joint_areas import JointAreas, joint_areas
from denselab.metrics.table import Floats, aligned, mean_of_known, names_or_numbers, or_none, percent, ratio
from denselab.segments import Segments


def coverings(
    pred: Segments, truth: Segments, num_classes: int, joint: JointAreas | None = None
) -> tuple[Floats, Floats]:
    """Numerator and denominator of Cov_c, float64 [K] each, for one image; both in one layer, class ids 0..K-1.

    joint: what `joint_areas` gives for the two, where it is known already.
    Raises InputError for several layers, other sizes and unknown classes.
    """
    for name, segments in (("prediction", pred), ("truth", truth)):
        if len(segments.layers) != 1:
            raise InputError(f"{name}: wanted one layer, got {len(segments.layers)}; panoptic segments do not overlap")
        if any(not 0 <= segment.class_id < num_classes for segment in segments.segments):
            raise InputError(f"{name}: wanted class ids in 0..{num_classes - 1}, got others; check num_classes")
    check_same_size(pred.hw, truth.hw)
    truth_classes = {segment.id: segment.class_id for segment in truth.segments if not segment.is_crowd}
    pred_classes = {segment.id: segment.class_id for segment in pred.segments}
    joint = joint_areas(truth.layers[0], pred.layers[0]) if joint is None else joint
    joint = {pair: area for pair, area in joint.items() if pair[0] in truth_classes}
    truth_areas = dict.fromkeys(truth_classes, 0)
    pred_areas: dict[int, int] = {}
    for (truth_id, pred_id), overlap in joint.items():
        truth_areas[truth_id] += overlap
        pred_areas[pred_id] = pred_areas.get(pred_id, 0) + overlap
    best = dict.fromkeys(truth_classes, 0.0)
    for (truth_id, pred_id), overlap in joint.items():
        if pred_classes.get(pred_id) == truth_classes[truth_id]:
            iou = overlap / (truth_areas[truth_id] + pred_areas[pred_id] - overlap)
            best[truth_id] = max(best[truth_id], iou)
    covered, total = np.zeros((2, num_classes))
    for truth_id, area in truth_areas.items():
        share = area / truth.layers[0].size
        covered[truth_classes[truth_id]] += share * best[truth_id]
        total[truth_classes[truth_id]] += share
    return covered, total


@dataclass(frozen=True, eq=False)
class CoveringFigures:
    """Parsing Covering in 0..1: over all classes in the truth, things and stuff, and per class [K] (nan if absent)."""

    pc: float
    things_pc: float
    stuff_pc: float
    is_thing: NDArray[np.bool_]
    covering: Floats

    @property
    def headline(self) -> Headline:
        """PC over all classes."""
        return Headline("PC", self.pc, higher_is_better=True)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None."""
        names = names_or_numbers(class_names, len(self.covering))
        return {
            "pc": or_none(self.pc),
            "things_pc": or_none(self.things_pc),
            "stuff_pc": or_none(self.stuff_pc),
            "classes": [
                {"name": name, "thing": bool(thing), "covering": or_none(value)}
                for name, thing, value in zip(names, self.is_thing, self.covering, strict=True)
            ],
        }

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """An aligned table in percent, one line per class, and the means."""
        names = names_or_numbers(class_names, len(self.covering))
        rows = [("class", "PC"), *((name, percent(value)) for name, value in zip(names, self.covering, strict=True))]
        means = (("mean", self.pc), ("things", self.things_pc), ("stuff", self.stuff_pc))
        return aligned([*rows, *((title, percent(value)) for title, value in means)])


class CoveringScore:
    """Coverings of a dataset: `update` per image, `merge` across processes, `compute` the figures."""

    def __init__(self, num_classes: int, things: Sequence[int] = ()) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes: must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.things = tuple(sorted(set(things)))
        self._covered, self._total = np.zeros((2, num_classes))

    def update(self, pred: Segments, truth: Segments, joint: JointAreas | None = None) -> None:
        """Count one image; takes and raises what `coverings` does."""
        covered, total = coverings(pred, truth, self.num_classes, joint)
        self._covered += covered
        self._total += total

    def merge(self, other: "CoveringScore") -> None:
        """Add what another score with the same settings has counted."""
        mine, theirs = ((s.num_classes, s.things) for s in (self, other))
        if mine != theirs:
            raise InputError(f"merge: scores must agree in (num_classes, things), got {mine} and {theirs}")
        self._covered += other._covered
        self._total += other._total

    def compute(self) -> CoveringFigures:
        """The figures of everything counted so far."""
        covering = ratio(self._covered, self._total)
        is_thing = np.isin(np.arange(self.num_classes), self.things)
        things_pc, stuff_pc = mean_of_known(covering[is_thing]), mean_of_known(covering[~is_thing])
        return CoveringFigures(mean_of_known(covering), things_pc, stuff_pc, is_thing, covering)
