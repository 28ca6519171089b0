"""What was measured of the small file, beside the same network in float: bytes, milliseconds, answers, scores.

Nothing here is estimated. Times are medians of runs in turns, one photo at a time, so that a busy moment hurts all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.export.parity import latencies_ms
from denselab.runtime.session import Session

_TURNS = 5
_TUPLES = {"kept", "left_float", "photo_hw", "scores"}

TORCH = "torch eager"
Photo = NDArray[np.uint8]


@dataclass(frozen=True)
class Score:
    """The figure that ranks, of the float model in torch and of the small file in one engine, on the same photos."""

    name: str
    higher_is_better: bool
    split: str
    images: int
    engine: str
    before: float
    after: float


@dataclass(frozen=True)
class Receipt:
    """What was measured.

    file_bytes, float_bytes: of the small file and of the same network written as float32. float_ms, small_ms: by
    engine, one photo of `photo_hw` px. same_as_simulation: share of answers that an engine gives as the simulation in
    torch does. same_as_float: of answers that the small file gives as the float model does. photos, photos_of: what
    both were compared on. integer_share: of all multiplications, what every engine computes in integers. kept: what
    stays at 8 bits. left_float: tensors that the plan does not quantize. simulated: quantizers that no engine has
    kernels for, computed in float. scores: None without --data. train_steps: batches that the quantized network was
    trained on, to answer as the float one does.
    """

    method: str
    budget: str
    mean_weight_bits: float | None
    mean_activation_bits: float | None
    kept: tuple[str, ...]
    left_float: tuple[str, ...]
    simulated: int
    file_bytes: int
    float_bytes: int
    float_ms: Mapping[str, float]
    small_ms: Mapping[str, float]
    photo_hw: tuple[int, int]
    threads: int
    integer_share: Mapping[str, float]
    same_as_simulation: Mapping[str, float]
    same_as_float: float
    photos: int
    photos_of: str
    scores: tuple[Score, ...] | None
    train_steps: int = 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Receipt":
        """The inverse of `to_dict`."""
        scores = data["scores"]
        height, width = data["photo_hw"]
        return cls(
            **{each.name: data[each.name] for each in fields(cls) if each.name in data.keys() - _TUPLES},
            kept=tuple(data["kept"]),
            left_float=tuple(data["left_float"]),
            photo_hw=(height, width),
            scores=None if scores is None else tuple(Score(**each) for each in scores),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        scores = None if self.scores is None else [vars(each) for each in self.scores]
        lists = {name: list(getattr(self, name)) for name in ("kept", "left_float", "photo_hw")}
        return {**vars(self), **lists, "scores": scores}

    def rows(self) -> list[tuple[str, str]]:
        """What was measured, in words, one fact per row."""
        height, width = self.photo_hw
        of = self.file_bytes / self.float_bytes
        found = [
            ("method", f"{self.method}, budget {self.budget}"),
            ("mean bits of weights", _number(self.mean_weight_bits)),
            ("mean bits of activations", _number(self.mean_activation_bits)),
            ("stays at 8 bits", ", ".join(self.kept) or "nothing beyond the plan"),
            ("stays in float", ", ".join(self.left_float) or "no operand of a product"),
            ("file", f"{self.file_bytes} bytes, {of:.3f} of {self.float_bytes} in float32"),
        ]
        if self.train_steps:
            found.insert(1, ("trained", f"{self.train_steps} steps, to answer as the float network does"))
        for each in self.scores or ():
            found.append(
                (
                    each.name,
                    f"{each.before:.4f} in float (torch), {each.after:.4f} small ({each.engine}): "
                    f"{each.after - each.before:+.4f} on {each.images} photos ({each.split})",
                )
            )
        if self.scores is None:
            found.append(("score", "not measured; give --data"))
        found.append(("same as float", f"{100 * self.same_as_float:.2f} % of answers, {self._compared()}"))
        found += [
            (f"same as simulation, {engine}", f"{100 * share:.3f} %")
            for engine, share in self.same_as_simulation.items()
        ]
        found.append(
            (f"time at {width}x{height}", f"of one photo, {self.threads} thread{'s' * (self.threads != 1)}, median")
        )
        for engine, small in self.small_ms.items():
            full = self.float_ms[engine]
            found.append((engine, f"{small:.2f} ms small, {full:.2f} ms float: {_speed(full, small)}"))
        for engine, share in self.integer_share.items():
            found.append((f"in integers, {engine}", f"{100 * share:.1f} % of all multiplications"))
        if TORCH in self.float_ms and self.small_ms:
            engine = min(self.small_ms, key=self.small_ms.__getitem__)
            full = self.float_ms[TORCH]
            speed = _speed(full, self.small_ms[engine])
            found.append((TORCH, f"{full:.2f} ms float; small in {engine}: {speed}"))
        if self.simulated:
            found.append(
                ("computed in float", f"{self.simulated} quantizers, for whose grids no engine has integer kernels")
            )
        return found

    def warnings(self) -> list[str]:
        """What a user would not like to find out later."""
        said = [
            f"the small file is slower than float in {engine}: {small:.2f} ms against {self.float_ms[engine]:.2f} ms"
            for engine, small in self.small_ms.items()
            if small > self.float_ms[engine]
        ]
        if self.file_bytes >= self.float_bytes:
            said.append(f"the small file is not smaller: {self.file_bytes} bytes against {self.float_bytes} bytes")
        return said

    def _compared(self) -> str:
        return f"on {self.photos} photos ({self.photos_of})"


def both_times_ms(
    small: Mapping[str, Session], full: Mapping[str, Session], eager: Session, photo: Photo
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the small file, and of the float one and the float network in eager torch, by engine."""
    every = {f"float {TORCH}": eager}
    for kind, engines in (("small", small), ("float", full)):
        every |= {f"{kind} {name}": session for name, session in engines.items() if name in small}
    found = latencies_ms(every, photo, _TURNS)
    small_ms, float_ms = (
        {name.removeprefix(f"{kind} "): ms for name, ms in found.items() if name.startswith(f"{kind} ")}
        for kind in ("small", "float")
    )
    return small_ms, float_ms


def _number(value: float | None) -> str:
    return "float" if value is None else f"{value:.2f}"


def _speed(full: float, small: float) -> str:
    if small > full:
        return f"{small / full:.2f} times SLOWER"
    return f"{full / small:.2f} times as fast"
