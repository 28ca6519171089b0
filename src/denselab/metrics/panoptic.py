"""Panoptic Quality (Kirillov et al. 2019, arXiv:1801.00868, eq. 1), as panopticapi counts it, and Boundary PQ.

PQ_c = sum of IoU over true positives / (TP + FP / 2 + FN / 2) = SQ_c RQ_c, where SQ_c is the mean IoU of the true
positives (0 without any); averages are taken over the classes with TP + FP + FN > 0.
Rules and their order follow panopticapi@7bb4655 panopticapi/evaluation.py `pq_compute_single_core`; they are spelled
out at `match_segments`. Boundary PQ follows boundary-iou-api@8006aa9 coco_panoptic_api/evaluation.py.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.boundary import boundary_width_px, inner_boundary
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.joint_areas import JointAreas, joint_areas
from denselab.metrics.parsing_covering import CoveringFigures, CoveringScore
from denselab.metrics.table import Counts, Floats, aligned, names_or_numbers, or_none, percent, ratio
from denselab.segments import Segments

VOID_ID = 0
_INTERIOR_ID = -1


@dataclass(frozen=True, eq=False)
class SegmentMatches:
    """Counts per class: iou_sum float64 [K] over true positives, and int64 [K] each of true positives, false
    positives and false negatives. unseen_ids: true segments without pixels, which are among the false negatives;
    joint: the areas all of it was counted from."""

    iou_sum: Floats
    tp: Counts
    fp: Counts
    fn: Counts
    unseen_ids: tuple[int, ...]
    joint: JointAreas


def match_segments(
    pred: Segments, truth: Segments, num_classes: int, boundary: bool = False, joint: JointAreas | None = None
) -> SegmentMatches:
    """Match the segments of one image, both in one layer, class ids 0..K-1.

    - A predicted and a true segment of one class match when their IoU is above 0.5 (strictly); the union leaves out
      the part of the prediction that lies on void truth (id 0). Crowd segments never match.
    - An unmatched true segment is a false negative, unless it is a crowd.
    - An unmatched predicted segment is a false positive, unless more than half of it (strictly) lies on void or on the
      crowd of its class. Where a class has several crowds only the LAST in the list forgives: a fault of the reference
      that is kept, for every published number has it.

    boundary: the IoU is min(mask IoU, boundary IoU) (Cheng et al. 2021, arXiv:2103.16562, section 6), where a segment's
    boundary is what lies within 2 % of the diagonal of its edge, the union again leaves out the predicted boundary on
    void truth, and forgiving goes by whole masks. The reference marks interiors by an id that a real segment may have;
    here they have one of their own.
    joint: what `joint_areas` gives for the two, where it is known already.
    Raises InputError for other sizes, ids without a segment, predicted segments without pixels, unknown classes.
    """
    truth_ids, pred_ids = _checked_ids(truth, "truth"), _checked_ids(pred, "prediction")
    check_same_size(pred.hw, truth.hw)
    joint = joint_areas(truth_ids, pred_ids) if joint is None else joint
    truth_classes = _classes(truth, "truth", num_classes, (truth_id for truth_id, _ in joint))
    pred_classes = _classes(pred, "prediction", num_classes, (pred_id for _, pred_id in joint))
    pred_areas = dict.fromkeys(pred_classes, 0)
    for (_, pred_id), overlap in joint.items():
        if pred_id != VOID_ID:
            pred_areas[pred_id] += overlap
    empty = [pred_id for pred_id, area in pred_areas.items() if not area]
    if empty:
        raise InputError(
            f"prediction: wanted pixels of every segment, got none of {_listed(empty)}; leave those segments out"
        )

    ious = _ious(joint)
    if boundary:
        width_px = boundary_width_px(*truth.hw)
        edges = _ious(joint_areas(_edges(truth_ids, width_px), _edges(pred_ids, width_px)))
        ious = {pair: min(iou, edges.get(pair, 0.0)) for pair, iou in ious.items()}

    iou_sum = np.zeros(num_classes)
    tp, fp, fn = np.zeros((3, num_classes), np.int64)
    crowd_ids = {segment.id for segment in truth.segments if segment.is_crowd}
    forgiving = {truth_classes[segment.id]: segment.id for segment in truth.segments if segment.is_crowd}
    matched_truth: set[int] = set()
    matched_pred: set[int] = set()
    for (truth_id, pred_id), iou in ious.items():
        class_id = truth_classes[truth_id]
        if iou > 0.5 and truth_id not in crowd_ids and class_id == pred_classes[pred_id]:
            tp[class_id] += 1
            iou_sum[class_id] += iou
            matched_truth.add(truth_id)
            matched_pred.add(pred_id)
    for truth_id, class_id in truth_classes.items():
        fn[class_id] += truth_id not in matched_truth and truth_id not in crowd_ids
    for pred_id, class_id in pred_classes.items():
        forgiven = joint.get((VOID_ID, pred_id), 0) + joint.get((forgiving.get(class_id, _INTERIOR_ID), pred_id), 0)
        fp[class_id] += pred_id not in matched_pred and forgiven / pred_areas[pred_id] <= 0.5
    unseen_ids = tuple(sorted(truth_classes.keys() - {truth_id for truth_id, _ in joint}))
    return SegmentMatches(iou_sum, tp, fp, fn, unseen_ids, joint)


@dataclass(frozen=True)
class Quality:
    """Means over `classes` classes; nan where there are none."""

    pq: float
    sq: float
    rq: float
    classes: int


@dataclass(frozen=True, eq=False)
class PanopticFigures:
    """Qualities in 0..1, over all classes, things and stuff, and per class [K]: pq, sq, rq (nan where a class is in
    neither truth nor prediction) and the counts.

    boundary: the same with min(mask IoU, boundary IoU); covering: Parsing Covering; None where they were not counted.
    """

    all: Quality
    things: Quality
    stuff: Quality
    is_thing: NDArray[np.bool_]
    pq: Floats
    sq: Floats
    rq: Floats
    tp: Counts
    fp: Counts
    fn: Counts
    boundary: "PanopticFigures | None" = None
    covering: CoveringFigures | None = None

    @property
    def headline(self) -> Headline:
        """PQ over all classes."""
        return Headline("PQ", self.all.pq, higher_is_better=True)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None."""
        names = names_or_numbers(class_names, len(self.pq))
        data: dict[str, object] = {
            **_quality_dict(self.all),
            "things": _quality_dict(self.things),
            "stuff": _quality_dict(self.stuff),
            "classes": [
                {
                    "name": name,
                    "thing": bool(self.is_thing[index]),
                    "pq": or_none(self.pq[index]),
                    "sq": or_none(self.sq[index]),
                    "rq": or_none(self.rq[index]),
                    "tp": int(self.tp[index]),
                    "fp": int(self.fp[index]),
                    "fn": int(self.fn[index]),
                }
                for index, name in enumerate(names)
            ],
        }
        if self.boundary is not None:
            data["boundary"] = self.boundary.to_dict(names)
        if self.covering is not None:
            data["parsing_covering"] = self.covering.to_dict(names)
        return data

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """Aligned tables: a line per class in percent with its counts, then the means; "-" for an absent class."""
        parts = [self] if self.boundary is None else [self, self.boundary]
        titles = [*_TITLES, *(f"boundary {title}" for title in _TITLES)][: 3 * len(parts)]
        columns = [values for part in parts for values in (part.pq, part.sq, part.rq)]
        groups = {title: [getattr(part, title) for part in parts] for title in ("all", "things", "stuff")}
        means = {title: [v for q in qualities for v in (q.pq, q.sq, q.rq)] for title, qualities in groups.items()}
        if (covering := self.covering) is not None:
            titles.append("PC")
            columns.append(covering.covering)
            for title, mean in (("all", covering.pc), ("things", covering.things_pc), ("stuff", covering.stuff_pc)):
                means[title].append(mean)
        rows = [["class", *titles, "TP", "FP", "FN"]]
        for index, name in enumerate(names_or_numbers(class_names, len(self.pq))):
            counts = (str(values[index]) for values in (self.tp, self.fp, self.fn))
            rows.append([name, *(percent(column[index]) for column in columns), *counts])
        totals = [["mean", *titles, "classes"]]
        for title, values in means.items():
            totals.append([title, *map(percent, values), str(groups[title][0].classes)])
        return f"{aligned(rows)}\n\n{aligned(totals)}"


class PanopticScore:
    """Matches of a dataset: `update` per image, `merge` across processes, `compute` the figures.

    things: ids of the classes whose objects are told apart; they only choose the classes of two of the means.
    boundary: also count Boundary PQ, which takes several times as long. covering: also count Parsing Covering.
    """

    def __init__(
        self, num_classes: int, things: Sequence[int] = (), boundary: bool = False, covering: bool = False
    ) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes: must be at least 1, got {num_classes}")
        strange = [index for index in things if not 0 <= index < num_classes]
        if strange:
            raise InputError(f"things: wanted class ids in 0..{num_classes - 1}, got {_listed(strange)}")
        self.num_classes = num_classes
        self.things = tuple(sorted(set(things)))
        self.boundary = boundary
        self._iou_sum = np.zeros((1 + boundary, num_classes))
        self._counts = np.zeros((1 + boundary, 3, num_classes), np.int64)
        self._covering = CoveringScore(num_classes, things) if covering else None

    def update(self, pred: Segments, truth: Segments) -> SegmentMatches:
        """Count one image and return its matches; see `match_segments` for the rules and what is refused."""
        matches = match_segments(pred, truth, self.num_classes)
        kinds = [matches]
        if self.boundary:
            kinds.append(match_segments(pred, truth, self.num_classes, boundary=True, joint=matches.joint))
        for kind, counted in enumerate(kinds):
            self._iou_sum[kind] += counted.iou_sum
            self._counts[kind] += (counted.tp, counted.fp, counted.fn)
        if self._covering is not None:
            self._covering.update(pred, truth, matches.joint)
        return matches

    def merge(self, other: "PanopticScore") -> None:
        """Add what another score with the same settings has counted."""
        mine, theirs = ((s.num_classes, s.things, s.boundary, s._covering is not None) for s in (self, other))
        if mine != theirs:
            raise InputError(
                f"merge: scores must agree in (num_classes, things, boundary, covering), got {mine} and {theirs}"
            )
        self._iou_sum += other._iou_sum
        self._counts += other._counts
        if self._covering is not None and other._covering is not None:
            self._covering.merge(other._covering)

    def compute(self) -> PanopticFigures:
        """The figures of everything counted so far."""
        boundary = self._figures(1) if self.boundary else None
        covering = None if self._covering is None else self._covering.compute()
        return replace(self._figures(0), boundary=boundary, covering=covering)

    def _figures(self, kind: int) -> PanopticFigures:
        iou_sum, (tp, fp, fn) = self._iou_sum[kind].copy(), self._counts[kind].copy()
        seen = tp + 0.5 * fp + 0.5 * fn
        pq, rq = ratio(iou_sum, seen), ratio(tp, seen)
        sq = np.where((seen > 0) & (tp == 0), 0.0, ratio(iou_sum, tp))
        is_thing = np.isin(np.arange(self.num_classes), self.things)

        def mean(chosen: NDArray[np.bool_]) -> Quality:
            chosen = chosen & (seen > 0)
            means = [float(values[chosen].mean()) if chosen.any() else math.nan for values in (pq, sq, rq)]
            return Quality(*means, classes=int(chosen.sum()))

        every = np.ones_like(is_thing)
        return PanopticFigures(mean(every), mean(is_thing), mean(~is_thing), is_thing, pq, sq, rq, tp, fp, fn)


_TITLES = ("PQ", "SQ", "RQ")


def _quality_dict(quality: Quality) -> dict[str, object]:
    shares = {"pq": or_none(quality.pq), "sq": or_none(quality.sq), "rq": or_none(quality.rq)}
    return {**shares, "classes_seen": quality.classes}


def _ious(joint: JointAreas) -> dict[tuple[int, int], float]:
    """IoU of every true and predicted segment that meet; the union leaves out the prediction on void truth."""
    truth_areas: dict[int, int] = {}
    pred_areas: dict[int, int] = {}
    for (truth_id, pred_id), overlap in joint.items():
        truth_areas[truth_id] = truth_areas.get(truth_id, 0) + overlap
        pred_areas[pred_id] = pred_areas.get(pred_id, 0) + overlap
    return {
        (truth_id, pred_id): overlap
        / (truth_areas[truth_id] + pred_areas[pred_id] - overlap - joint.get((VOID_ID, pred_id), 0))
        for (truth_id, pred_id), overlap in joint.items()
        if truth_id > VOID_ID and pred_id > VOID_ID
    }


def _edges(ids: NDArray[np.int32], width_px: int) -> NDArray[np.int32]:
    """The id map with the interiors of segments blanked out; void stays void."""
    return np.where((ids == VOID_ID) | inner_boundary(ids, width_px), ids, np.int32(_INTERIOR_ID))


def _checked_ids(segments: Segments, name: str) -> NDArray[np.int32]:
    if len(segments.layers) != 1:
        raise InputError(f"{name}: wanted one layer, got {len(segments.layers)}; panoptic segments do not overlap")
    return segments.layers[0]


def _classes(segments: Segments, name: str, num_classes: int, ids: Iterable[int]) -> dict[int, int]:
    """Class by segment id. Raises InputError for classes outside 0..K-1 and for ids that have no segment."""
    classes = {segment.id: segment.class_id for segment in segments.segments}
    strange = sorted({class_id for class_id in classes.values() if not 0 <= class_id < num_classes})
    if strange:
        raise InputError(f"{name}: wanted class ids in 0..{num_classes - 1}, got {_listed(strange)}; check num_classes")
    unknown = sorted(set(ids) - classes.keys() - {VOID_ID})
    if unknown:
        raise InputError(
            f"{name}: wanted a segment for every id in the map, got none for {_listed(unknown)}; "
            "list those segments too, or set their pixels to 0 (void)"
        )
    return classes


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
