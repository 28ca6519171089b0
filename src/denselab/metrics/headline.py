"""What every score's figures can say: the one number that ranks, everything as data, everything as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Headline:
    """The one figure a task is ranked by; value: nan where nothing was measured."""

    name: str
    value: float
    higher_is_better: bool

    def better_than(self, other: "Headline") -> bool:
        """Whether this value is the better one; any number is better than nan."""
        if self.value != self.value or other.value != other.value:
            return self.value == self.value and other.value != other.value
        return self.value > other.value if self.higher_is_better else self.value < other.value


class Figures(Protocol):
    """What `compute` of a score returns."""

    @property
    def headline(self) -> Headline:
        """The figure that ranks."""
        ...

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None."""
        ...

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """A table for people."""
        ...
