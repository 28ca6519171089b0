"""Truth refuses what cannot be true; segment maps against values worked by hand."""

import numpy as np
import pytest

from denselab.data.segment_maps import by_id, painted, things_of, truth_of_segments
from denselab.data.truth import Truth
from denselab.errors import InputError
from denselab.segments import Segment, Segments

CAT, GRASS = 0, 1


def two_layers() -> Segments:
    """Cat 5 under cat 9 in the middle, a crowd of cats (12), grass (300) at the right; column 0 is in no segment."""
    layers = np.array([[[0, 5, 5, 12, 300]], [[0, 0, 9, 0, 0]]], np.int32)
    crowd = Segment(12, CAT, is_crowd=True)
    return Segments(layers, (Segment(300, GRASS), Segment(9, CAT), Segment(5, CAT), crowd))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_ids": np.zeros((2, 3), np.int64)}, r"class_ids: wanted uint8 \[H, W\], got int64 \[2, 3\]"),
        ({"depth_m": np.full((2, 3), -1, np.float32)}, r"depth_m: wanted metres of 0 \(unknown\) or more"),
        ({"depth_m": np.full((2, 3), np.nan, np.float32)}, r"depth_m: wanted metres"),
        ({"normals": np.full((2, 3, 3), 0.9, np.float32)}, r"normals: wanted unit vectors, or zeros"),
        ({"normals": np.zeros((3, 2, 3), np.float64)}, r"normals: wanted float32 \[H, W, 3\], got float64"),
        ({"intrinsics": np.eye(4)}, r"intrinsics: wanted float64 \[3, 3\], got float64 \[4, 4\]"),
        (
            {"class_ids": np.zeros((2, 3), np.uint8), "depth_m": np.zeros((3, 2), np.float32)},
            r"truth: wanted one size for all, got \{'class_ids': \(2, 3\), 'depth_m': \(3, 2\)\}",
        ),
    ],
)
def test_what_cannot_be_true_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Truth(**fields)  # type: ignore[arg-type]


def test_nothing_known_has_no_size() -> None:
    assert Truth().hw is None
    assert Truth(segments=two_layers()).hw == (1, 5)


def test_values_by_id() -> None:
    segments = two_layers()
    values = by_id(segments.layers, segments.segments, [1.5, 2.5, 3.5, 4.5], -1.0)
    assert values.tolist() == [[[-1, 3.5, 3.5, 4.5, 1.5]], [[-1, -1, 2.5, -1, -1]]]
    assert by_id(segments.layers, (), [], 7).tolist() == [[[7] * 5]] * 2


def test_later_layers_lie_on_top() -> None:
    top = Segments(two_layers().layers, (Segment(5, 3), Segment(9, 4), Segment(12, 5), Segment(300, 6)))
    assert painted(top).tolist() == [[255, 3, 4, 5, 6]]


def test_panoptic_and_instance_truth_of_the_same_segments() -> None:
    segments = two_layers()
    panoptic = truth_of_segments(segments, {"panoptic", "semantic"}, (CAT,))
    assert panoptic.segments is segments
    assert panoptic.void is not None
    assert panoptic.void.tolist() == [[True, False, False, True, False]]
    assert panoptic.class_ids is not None
    assert panoptic.class_ids.tolist() == [[255, CAT, CAT, CAT, GRASS]]
    instance = truth_of_segments(segments, {"instance"}, (CAT,), void=np.array([[True, *[False] * 4]]))
    assert instance.segments is not None
    assert {segment.id for segment in instance.segments.segments} == {5, 9, 12}
    assert instance.segments.layers.max() == 12
    assert instance.void is not None
    assert instance.void.tolist() == [[True, False, False, True, False]], "grass is background, not void"
    assert instance.class_ids is None


def test_named_background_becomes_a_segment() -> None:
    truth = truth_of_segments(two_layers(), {"panoptic", "semantic"}, (CAT,), background=2)
    assert truth.segments is not None
    assert truth.segments.layers[:, 0].tolist() == [[301, 5, 5, 12, 300], [0, 0, 9, 0, 0]]
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[2, 0, 0, 0, 1]]
    assert truth.void is not None
    assert truth.void.sum() == 1


def test_no_thing_is_left() -> None:
    left = things_of(two_layers(), (4,))
    assert left.segments == ()
    assert left.layers.tolist() == [[[0] * 5]]
