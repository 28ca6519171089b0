"""Label PNGs (pixel value or palette index = class id) against label PNGs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from denselab.errors import InputError
from denselab.metrics.semantic import SemanticScore
from denselab.runtime.images import open_labels
from denselab.scoring.count import Scored, Track, count
from denselab.scoring.folders import FileKind, FilePair, match_folders

LABELS = FileKind("label PNGs", "semantic")


def score_semantic(
    pred: Path,
    gt: Path,
    class_names: Sequence[str],
    ignore: Sequence[int],
    boundary: bool,
    jobs: int,
    allow_missing: bool,
    track: Track,
) -> Scored:
    """Pixel counts over two folders of label PNGs. Raises InputError as `match_folders` does."""
    pairs, unmatched = match_folders(pred, gt, LABELS, allow_missing)
    total = SemanticScore(len(class_names), ignore, boundary)
    counting = partial(_count, num_classes=len(class_names), ignore=total.ignore, boundary=boundary)
    failures = count([(pair.name, pair) for pair in pairs], counting, total, jobs, track)
    counted = len(pairs) - len(failures)
    return Scored(total.compute(), class_names, counted, failures, unmatched, {"ignore": list(ignore)})


def _count(pair: FilePair, num_classes: int, ignore: Sequence[int], boundary: bool) -> SemanticScore | str:
    counted = SemanticScore(num_classes, ignore, boundary)
    try:
        counted.update(open_labels(pair.pred), open_labels(pair.truth))
    except InputError as error:
        return str(error)
    return counted
