"""denselab.load: whatever a model was saved as, open it."""

from importlib.util import find_spec
from pathlib import Path

from denselab._packaged import PACKAGED
from denselab.errors import InputError
from denselab.hub import is_published
from denselab.runtime.artifact import read_info
from denselab.runtime.predictor import MIN_SCORE, LongSide, Predictor
from denselab.runtime.session import open_session


def load(
    model: str | Path = "street",
    engine: str = "auto",
    threads: int | None = None,
    long_side: LongSide = "auto",
    min_score: float = MIN_SCORE,
) -> Predictor:
    """Open a model: "street" (built in), an artifact (.onnx) or, with PyTorch, a checkpoint (.ckpt), hf:NAME or
    kmax:FILE.

    hf:NAME is a model of the Hugging Face hub, or a folder that transformers saved (see denselab.from_hf); kmax:FILE a
    checkpoint of the public kMaX-DeepLab (see denselab.from_kmax).

    engine: auto, openvino or onnxruntime, for artifacts; threads: of the engine, None lets it decide;
    long_side: at what size the model sees large images; min_score: instances of which it is less sure are dropped
    (see runtime.predictor.Predictor).
    Raises InputError for anything that cannot be opened, saying why.
    """
    path = PACKAGED.get(str(model), Path(model))
    published = is_published(str(model))
    if path.suffix not in (".onnx", ".ckpt") and not published:
        names = ", ".join(PACKAGED)
        raise InputError(
            f"model: wanted {names}, an artifact (FILE.onnx), a checkpoint (FILE.ckpt), hf:NAME or kmax:FILE, "
            f"got {model}"
        )
    if published or path.suffix == ".ckpt":
        predictor = _load_with_torch(str(model), threads)
    else:
        info = read_info(path)
        predictor = Predictor(open_session(path, engine, threads), info)
    predictor.long_side, predictor.min_score = long_side, min_score
    return predictor


def _load_with_torch(source: str, threads: int | None) -> Predictor:
    if not is_published(source) and not Path(source).is_file():
        raise InputError(f"{source}: no such model file; check the path")
    if not find_spec("torch"):
        raise InputError(
            f'{source}: such a model needs PyTorch; install it with: pip install "denselab[train]", '
            "or export it to .onnx where PyTorch is"
        )
    import torch

    from denselab.export.torch_session import load_predictor

    if threads is not None:
        torch.set_num_threads(threads)
    return load_predictor(source)
