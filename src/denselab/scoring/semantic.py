"""Label PNGs (pixel value or palette index = class id) against label PNGs, and how sure the labels were."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from denselab.errors import InputError
from denselab.metrics.calibration import CalibrationScore
from denselab.metrics.semantic import SemanticScore
from denselab.runtime.images import open_labels
from denselab.scoring.count import Scored, Track, count
from denselab.scoring.folders import FileKind, FilePair, find_files, match_folders, refuse_unmatched
from denselab.scoring.rasters import FLOAT_SUFFIXES, read_confidence

LABELS = FileKind("label PNGs", "semantic")
CONFIDENCES = FileKind("confidences (grey PNG, .npy or .npz)", "confidence", (".png", *FLOAT_SUFFIXES))


@dataclass(frozen=True)
class _Counts:
    """What is kept between images; calibration: None where there are no confidences."""

    labels: SemanticScore
    calibration: CalibrationScore | None

    def merge(self, other: "_Counts") -> None:
        self.labels.merge(other.labels)
        if self.calibration is not None and other.calibration is not None:
            self.calibration.merge(other.calibration)


def score_semantic(
    pred: Path,
    gt: Path,
    class_names: Sequence[str],
    ignore: Sequence[int],
    boundary: bool,
    jobs: int,
    allow_missing: bool,
    track: Track,
    confidence: Path | None = None,
) -> Scored:
    """Pixel counts over two folders of label PNGs. Raises InputError as `match_folders` does.

    confidence: a folder with the probability of every pixel's predicted class, or of all classes [K, H, W]; then
    calibration is counted too. Where those of all classes are given, the likeliest of them is the prediction.
    """
    pairs, unmatched = match_folders(pred, gt, LABELS, allow_missing)
    sure: Mapping[str, Path] = {}
    if confidence is not None:
        sure = find_files("--confidence", confidence, CONFIDENCES)
        known = {pair.name for pair in pairs}
        lonely = [str(pair.pred) for pair in pairs if pair.name not in sure]
        lonely += [str(path) for name, path in sure.items() if name not in known]
        refuse_unmatched("files", lonely, allow_missing)
        pairs = [pair for pair in pairs if pair.name in sure]
        unmatched = [*unmatched, *lonely]
        if not pairs or any(sure[pair.name].samefile(pair.pred) for pair in pairs):
            got = "the labels themselves" if pairs else "none of the same name"
            raise InputError(f"--confidence: wanted a folder of confidences named as --pred, got {got} in {confidence}")

    zeros = partial(_zeros, len(class_names), tuple(ignore), boundary, confidence is not None)
    total = zeros()
    named = [(pair.name, (pair, sure.get(pair.name))) for pair in pairs]
    failures = count(named, partial(_count, zeros=zeros), total, jobs, track)
    return Scored(
        total.labels.compute(),
        class_names,
        len(pairs) - len(failures),
        failures,
        unmatched,
        {"ignore": list(ignore)},
        None if total.calibration is None else total.calibration.compute(),
    )


def _zeros(num_classes: int, ignore: Sequence[int], boundary: bool, calibrated: bool) -> _Counts:
    calibration = CalibrationScore(ignore=ignore) if calibrated else None
    return _Counts(SemanticScore(num_classes, ignore, boundary), calibration)


def _count(item: tuple[FilePair, Path | None], zeros: Callable[[], _Counts]) -> _Counts | str:
    pair, confidence = item
    counted = zeros()
    try:
        pred_ids, truth_ids = open_labels(pair.pred), open_labels(pair.truth)
        counted.labels.update(pred_ids, truth_ids)
    except InputError as error:
        return str(error)
    if confidence is None or counted.calibration is None:
        return counted
    try:
        probs = read_confidence(confidence)
        if probs.ndim == 2:
            counted.calibration.update_confidence(probs, pred_ids, truth_ids)
            return counted
        if len(probs) != counted.labels.num_classes:
            raise InputError(
                f"wanted confidences [H, W] or class probabilities [{counted.labels.num_classes}, H, W], "
                f"got {list(probs.shape)}; give those of all classes, classes first"
            )
        counted.calibration.update(probs, truth_ids)
    except InputError as error:
        return f"{error} (confidence: {confidence})"
    return counted
