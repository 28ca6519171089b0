"""torchvision beside whatever torch is here, also where processes start afresh."""

import multiprocessing
import subprocess
import sys

from denselab import _vision


def resized_shape(size: int) -> tuple[int, ...]:
    """Runs in a spawned process, which imports this module and so the shim."""
    import torch
    from torchvision.transforms import v2

    return tuple(v2.functional.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [size, size]).shape)


def test_spawned_process_has_torchvision() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(resized_shape, (4,)) == (3, 4, 4)


def test_fresh_process_imports_what_needs_torchvision_without_a_warning() -> None:
    code = (
        "from denselab import _vision\nimport torchvision, timm\nfrom torchvision.transforms import v2\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def test_importing_twice_declares_nothing_twice() -> None:
    before = list(_vision._libraries)
    _vision.import_torchvision()
    assert _vision._libraries == before
