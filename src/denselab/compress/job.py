"""One compression: what is compressed and how, what was made on the way, and where that is saved."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from denselab.compress.bit_losses import Importance
from denselab.compress.graph import Graph
from denselab.compress.methods.all import method_named
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.names import MethodName
from denselab.compress.observing import Stats
from denselab.compress.options import Options, importance_of
from denselab.compress.plan import QuantPlan
from denselab.compress.scoring import Data, Track, photos_to_compare
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.subject import Classifier, Photos, Subject
from denselab.compress.traces import Traces
from denselab.compress.work_folder import WorkFolder
from denselab.export.examples import Examples

MEASURED_PHOTOS, MEASURED_DENSE_PHOTOS = 16, 4
"""What bits lose is measured with so many. A dense photo asks about thousands of pixels: a few of them tell."""


@dataclass(frozen=True, eq=False)
class Job:
    """What all stages share.

    graph: of the network, norms folded. network_hw: the size that the file runs at inside, None for any. seen: the
    calibration photos, as the network sees them. data: what is scored on. work: the folder of saved stages. say: is
    told what happens. track: shows how far a loop is. name: of the method. given: the plan of the user. traces: of what
    was exported.
    """

    subject: Subject
    options: Options
    graph: Graph
    network_hw: tuple[int, int] | None
    seen: tuple[Tensor, ...]
    data: Data | None
    work: WorkFolder
    say: Callable[[str], None]
    track: Track
    name: MethodName
    given: QuantPlan | None
    traces: Traces = field(default_factory=Traces)
    _quantized: list[tuple[Method, QuantPlan, QuantizedGraph]] = field(
        default_factory=list[tuple[Method, QuantPlan, QuantizedGraph]]
    )

    @property
    def method(self) -> Method:
        """What quantizes; not for `I_VIT`, which has a way of its own."""
        return method_named(self.name)

    @property
    def importance(self) -> Importance:
        """What decides where bits go, where there is something to decide."""
        return importance_of(self.options.importance, self.name)

    @property
    def measured_images(self) -> int:
        """How many photos relevance and losses are measured with, from the first."""
        most = MEASURED_PHOTOS if isinstance(self.subject.kind, Classifier) else MEASURED_DENSE_PHOTOS
        return min(most, len(self.seen))

    @cached_property
    def batches(self) -> Photos:
        """The calibration photos as the network takes them."""
        return Photos(self.subject, self.seen)

    @cached_property
    def calibration(self) -> Calibration:
        """What methods look at."""
        return Calibration(self.batches, self.subject.change, self.options.seed, self.say)

    @cached_property
    def examples(self) -> Examples:
        """The photos on which files and networks are compared."""
        return photos_to_compare(self.subject, self.data, self.seen)

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What every stage that looks at photos notes of them."""
        digest = hashlib.sha256()
        for each in self.seen:
            digest.update(f"{tuple(each.shape)}".encode() + each.contiguous().numpy().tobytes())
        return {"calibration_photos": digest.hexdigest()}

    def pixels(self, most: int) -> list[Tensor]:
        """The first calibration photos, one by one, as the network takes them."""
        return [self.subject.pixels(each[None]) for each in self.seen[:most]]

    def quantized(self, method: Method, stats: Stats, plan: QuantPlan) -> QuantizedGraph:
        """The network as a plan says; not done again for the plan that was the last."""
        if not self._quantized or self._quantized[0][:2] != (method, plan):
            self._quantized[:] = [(method, plan, method.quantize(self.graph, stats, plan, self.calibration))]
        return self._quantized[0][2]
