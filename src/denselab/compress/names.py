"""What a compression may be asked for, by plain names: apart from the rest, so that the help needs no torch."""

from enum import StrEnum


class MethodName(StrEnum):
    """Names of `methods.all.METHODS`, and of the integer program. AUTO: the best of what was measured here."""

    AUTO = "auto"
    REPQ_VIT = "repq-vit"
    ADALOG = "adalog"
    IS_VIT = "is-vit"
    DOPQ_VIT = "dopq-vit"
    APHQ_VIT = "aphq-vit"
    LRP_QVIT = "lrp-qvit"
    MIX_QVIT = "mix-qvit"
    I_VIT = "i-vit"
    MINMAX = "minmax"


class ImportanceName(StrEnum):
    """What decides where bits go: names of `bit_losses.Importance`, as they are typed."""

    SENSITIVITY = "sensitivity"
    LRP = "lrp"
    LRP_TIMES_SENSITIVITY = "lrp-x-sensitivity"
    FISHER = "fisher"
    GRADIENT = "gradient"
    UNIFORM = "uniform"
    RANDOM = "random"


class KeepName(StrEnum):
    """What stays at 8 bits: names of `plan.Kept`, as they are typed."""

    FIRST_INPUT = "first-input"
    FIRST_WEIGHT = "first-weight"
    HEAD = "head"
    NOTHING = "nothing"
