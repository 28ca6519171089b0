"""What every score asks of a pair of maps."""

from denselab.errors import InputError


def check_same_size(pred_hw: tuple[int, ...], truth_hw: tuple[int, ...]) -> None:
    """Raise InputError unless prediction and truth have the same height and width in px."""
    if pred_hw[:2] != truth_hw[:2]:
        (pred_h, pred_w), (truth_h, truth_w) = pred_hw[:2], truth_hw[:2]
        raise InputError(
            f"prediction is {pred_w}x{pred_h} px but truth is {truth_w}x{truth_h} px; "
            "write the prediction at the size of the truth"
        )
