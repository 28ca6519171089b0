"""What every test may ask for."""

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; child processes inherit it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data with ground truth beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def camvid(shared_data: Path) -> Path:
    """CamVid as SegNet used it: 367 / 101 / 233 street scenes of 480x360."""
    return shared_data / "camvid"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: the maps of tests are too small to share, two threads spend three times the CPU."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_registry() -> Iterator[None]:
    """The exporter's table of operators, built once: torch.onnx builds the same for every export, in half a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    built = functools.cache(ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(built))
        yield


class _SignalStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def no_small_signal_stack() -> None:
    """Take signals on the ordinary stack: the alternate one that faulthandler sets is too small for the registers of
    some processors once an inference engine has run, and a data loader's SIGCHLD then kills the process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, 2, 0)), None)  # 2: SS_DISABLE
