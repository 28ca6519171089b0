"""What a user asks of a compression, and what of it can be refused before anything is opened."""

from dataclasses import dataclass
from pathlib import Path

from denselab.compress.bit_losses import Importance
from denselab.compress.budgets import parse_budget
from denselab.compress.names import ImportanceName, MethodName
from denselab.compress.plan import KEPT, Kept
from denselab.errors import InputError
from denselab.export.artifact import check_target

BY_LRP = (Importance.LRP, Importance.LRP_TIMES_SENSITIVITY)
"""What relevance propagation runs for."""

_IMPORTANCES = {
    ImportanceName.SENSITIVITY: Importance.SENSITIVITY,
    ImportanceName.LRP: Importance.LRP,
    ImportanceName.LRP_TIMES_SENSITIVITY: Importance.LRP_TIMES_SENSITIVITY,
    ImportanceName.FISHER: Importance.FISHER,
    ImportanceName.GRADIENT: Importance.GRADIENT_TIMES_ACTIVATION,
    ImportanceName.UNIFORM: Importance.UNIFORM,
    ImportanceName.RANDOM: Importance.RANDOM,
}
_OWN_IMPORTANCE = {
    MethodName.LRP_QVIT: Importance.LRP,
    MethodName.MIX_QVIT: Importance.LRP_TIMES_SENSITIVITY,
}


@dataclass(frozen=True)
class Options:
    """What a user asks for.

    calibrate: folder or .zip of photos, of which so many `images` are taken. budget: see `budgets.parse_budget`; None
    with a plan alone. method, importance: None: `auto`, and the method's own. kept: stays at 8 bits.
    quantize_attention: products of two activations too, where the budget does not ask for it (see
    `within_budget.float_products`). plan: used as it is. data: to score on. work: folder of the stages; None: beside
    `out`. seed: of all that is drawn at random. min_agreement: see `small_file.EXACT_CLASSES`. train_steps: batches of
    photos on which the quantized network learns to answer as the float one does (see `qat`), as plans of 2 bits need.
    """

    calibrate: Path
    out: Path
    budget: str | None = None
    method: MethodName | None = None
    quantize_attention: bool = False
    images: int = 128
    importance: ImportanceName | None = None
    kept: frozenset[Kept] = KEPT
    plan: Path | None = None
    data: Path | None = None
    work: Path | None = None
    overwrite: bool = False
    seed: int = 0
    min_agreement: float | None = None
    train_steps: int = 0

    @property
    def work_folder(self) -> Path:
        """The folder of the stages."""
        return self.out.with_suffix(".work") if self.work is None else self.work

    def check(self) -> None:
        """Raise InputError for what can be refused before anything is opened."""
        check_target(self.out, self.overwrite)
        if self.train_steps < 0:
            raise InputError(f"--train-steps: wanted a whole number from 0 up, got {self.train_steps}")
        if self.method is MethodName.I_VIT:
            if self.train_steps:
                raise InputError("--method i-vit: its integers cannot be trained; drop --train-steps")
            if self.budget is not None or self.plan is not None:
                raise InputError("--method i-vit: wanted neither --budget nor --plan, for its bits are fixed; drop it")
            return
        if self.quantize_attention and self.plan is not None:
            raise InputError("--quantize-attention: wanted with a budget, for a plan is used as it is; edit the plan")
        if self.budget is None and self.plan is None:
            raise InputError("--budget: wanted one such as 4.0bits, 2.5MB, 0.25x or 8ms, or --plan FILE; got neither")
        if self.budget is not None and self.plan is not None:
            raise InputError("--budget, --plan: wanted one of them, got both; a plan is used as it is, drop --budget")
        if self.budget is not None:
            parse_budget(self.budget, 1)
        if self.plan is not None and not self.plan.is_file():
            what = "a folder" if self.plan.is_dir() else "which does not exist"
            raise InputError(f"--plan: wanted a file, got {self.plan}, {what}; check the path")


def importance_of(asked: ImportanceName | None, method: MethodName) -> Importance:
    """What was asked for, or what the method's paper has."""
    if asked is not None:
        return _IMPORTANCES[asked]
    return _OWN_IMPORTANCE.get(method, Importance.SENSITIVITY)
