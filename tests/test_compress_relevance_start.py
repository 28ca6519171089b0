"""Where relevance starts in dense outputs: worked by hand, and at a whole model."""

import pytest
import torch
from torch import Tensor

from denselab import _vision as _vision
from denselab import zoo
from denselab.compress.graph import capture
from denselab.compress.relevance.lrp import LrpRules, lrp, lrp_graph
from denselab.compress.relevance.scores import pixel_relevance
from denselab.compress.relevance.start import classes, depth, log_likelihood, logit, normals, segments
from denselab.errors import InputError
from denselab.tasks.blend import blended
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(kind: ValueKind, norm: MaskNorm = MaskNorm.SOFTMAX, queries: int = 3, dim: int = 3) -> HeadSpec:
    return HeadSpec(queries, dim, 4, norm, kind)


def output_of(masks: list[list[float]], values: list[list[float]] | None = None) -> QueryOutput:
    """One image of one row: masks by query and pixel."""
    mask_logits = torch.tensor(masks).view(1, len(masks), 1, -1).requires_grad_()
    given = torch.eye(len(masks)) if values is None else torch.tensor(values)
    return QueryOutput(mask_logits, given[None].requires_grad_())


IDENTITY = spec_of(ValueKind.IDENTITY)
PIXELS = output_of([[1.0, 5.0], [3.0, 2.0], [0.5, -1.0]])  # class 1 wins pixel 0, class 0 wins pixel 1


def test_classes_by_hand() -> None:
    assert classes(IDENTITY)(PIXELS).tolist() == [8.0]
    assert [classes(IDENTITY, class_id)(PIXELS).item() for class_id in range(3)] == [5.0, 3.0, 0.0]
    offsets = output_of([[1.0, 5.0], [3.0, 2.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0]])
    assert classes(spec_of(ValueKind.CENTRE_OFFSET, queries=5))(offsets).tolist() == [8.0]


QUERIES = spec_of(ValueKind.CLASS_LOGITS, MaskNorm.SIGMOID, queries=2)
TWO_MASKS = output_of([[4.0, 2.0, -3.0], [-5.0, -5.0, 6.0]], [[3.0, 0.0, 0.0], [-1.0, 5.0, 0.0]])


def test_classes_that_queries_say_by_hand() -> None:
    """Query 0 says class 0 at two pixels, query 1 class 1 at the third."""
    assert classes(QUERIES)(TWO_MASKS).item() == pytest.approx((3 + 4) + (3 + 2) + (5 + 6))
    assert classes(QUERIES, 1)(TWO_MASKS).item() == pytest.approx(5 + 6)


def test_segments_by_hand() -> None:
    assert segments(QUERIES)(TWO_MASKS).item() == pytest.approx((3 + (4 + 2) / 2) + (5 + 6))
    competing = spec_of(ValueKind.CLASS_LOGITS, queries=2)
    assert segments(competing)(TWO_MASKS).item() == pytest.approx((3 + (4 + 2) / 2) + (5 + 6))


def test_segments_that_are_not_kept() -> None:
    unsure = output_of([[4.0, 2.0], [-5.0, 3.0]], [[5.0, 0.0, 0.0], [0.0, 0.0, 4.0]])  # query 1: no object
    assert segments(QUERIES)(unsure).item() == pytest.approx(5 + 3)
    none = output_of([[4.0, 2.0], [-5.0, 3.0]], [[0.1, 0.0, 9.0], [0.0, 0.0, 9.0]])  # the surest is taken
    assert segments(QUERIES)(none).item() == pytest.approx(0.1 + 3)
    empty = output_of([[-4.0, -2.0], [-5.0, -3.0]], [[5.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    assert segments(QUERIES)(empty).item() == pytest.approx(5.0)


def test_depth_by_hand() -> None:
    spec = spec_of(ValueKind.IDENTITY, queries=1, dim=1)
    metres = output_of([[2.0, 7.0]])
    assert depth(spec)(metres).tolist() == [9.0]
    assert depth(spec, (0, 1))(metres).tolist() == [7.0]
    with pytest.raises(InputError, match="point: wanted a cell within 1x2, got row 0, column 2"):
        depth(spec, (0, 2))(metres)


def test_blended_values_share_with_their_masks() -> None:
    spec = spec_of(ValueKind.BLENDED, queries=2, dim=1)
    bins = output_of([[0.0, 2.0], [0.0, -2.0]], [[1.0], [9.0]])
    begin = depth(spec)(bins)
    torch.testing.assert_close(begin, blended(bins, spec).sum((1, 2, 3)))
    of_values, of_masks = torch.autograd.grad(begin.sum(), [bins.values, bins.mask_logits], retain_graph=True)
    whole = torch.autograd.grad(blended(bins, spec).sum(), [bins.values, bins.mask_logits])
    torch.testing.assert_close(of_values, whole[0] / 2)
    torch.testing.assert_close(of_masks, whole[1] / 2)


def test_normals_by_hand() -> None:
    """At every pixel the cosine is 1, and its gradient the answer by its length."""
    spec = spec_of(ValueKind.IDENTITY)
    vectors = output_of([[3.0, 0.0], [0.0, 0.0], [4.0, 2.0]])
    begin = normals(spec)(vectors)
    assert begin.tolist() == pytest.approx([2.0])
    (gradient,) = torch.autograd.grad(begin.sum(), [vectors.mask_logits])
    wanted = torch.tensor([[3 / 25, 0.0], [0.0, 0.0], [4 / 25, 1 / 2]]).view(1, 3, 1, 2)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close((gradient * vectors.mask_logits).sum().detach(), torch.tensor(2.0))
    silent = normals(spec)(output_of([[0.0], [0.0], [0.0]]))
    assert silent.tolist() == [0.0]


def test_classifiers_by_hand() -> None:
    class_logits = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    assert logit(class_logits).tolist() == [3.0, 5.0]
    assert logit(class_logits, 1).tolist() == [3.0, 2.0]
    wanted = class_logits.softmax(1).amax(1).log()
    torch.testing.assert_close(log_likelihood(class_logits), wanted)
    torch.testing.assert_close(log_likelihood(class_logits[..., None].expand(2, 2, 3)), 3 * wanted)


def test_bad_starts() -> None:
    with pytest.raises(InputError, match=r"class: wanted 0\.\.1, got 2"):
        logit(torch.zeros(1, 2), 2)
    with pytest.raises(InputError, match=r"class: wanted 0\.\.2, got -1"):
        classes(IDENTITY, -1)(PIXELS)
    with pytest.raises(InputError, match="segments: wanted a head whose queries say classes, got 'channel q is"):
        segments(IDENTITY)(PIXELS)
    for wrong in (depth(QUERIES), normals(spec_of(ValueKind.CENTRE_OFFSET))):
        with pytest.raises(
            InputError, match="start: wanted a head that says a number or vector of every pixel, got 'cl"
        ):
            wrong(TWO_MASKS)


def test_a_segmenter_from_its_classes_to_its_pixels() -> None:
    torch.manual_seed(0)
    model = zoo.small(3).eval()
    pixels = torch.rand(1, 3, 32, 48)
    graph = capture(model, pixels, free=frozenset())
    propagating = lrp_graph(graph, LrpRules(conv_gamma=0.25))

    def start(output: QueryOutput) -> Tensor:
        return classes(model.spec, 1)(output)

    heat = pixel_relevance(propagating.run, pixels, start, blank=model.mean)
    assert heat.shape == (1, 32, 48)
    scores = lrp(graph, [pixels], start)
    assert list(scores) == [site.key for site in graph.sites]
    last = next(reversed(scores))
    with torch.no_grad():
        output = graph.run(pixels)
        bias = model.head.classify.bias[1] * (output.mask_logits.argmax(1) == 1).sum()
        assert scores[last].signed == pytest.approx((start(output) - bias).item(), rel=1e-3)
