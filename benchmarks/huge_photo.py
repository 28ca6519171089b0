"""A 12000x9000 photo through `denselab predict` (peak memory, wall), and tiled against whole at 2000x1500.

python benchmarks/huge_photo.py PHOTO.jpg [--model street] [--out RESULT.json]
The photo is enlarged to both sizes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import run_process, write_result
from PIL import Image

import denselab
from denselab.runtime.tiling import TILE_PX, run_tiled

parser = argparse.ArgumentParser()
parser.add_argument("photo")
parser.add_argument("--model", default="street")
parser.add_argument("--out")
given = parser.parse_args()

photo = Image.open(given.photo).convert("RGB")
with tempfile.TemporaryDirectory() as folder:
    large = Path(folder) / "large.jpg"
    photo.resize((12000, 9000), Image.Resampling.BICUBIC).save(large, quality=90)
    cost = run_process(
        [
            sys.executable,
            "-m",
            "denselab",
            "predict",
            str(large),
            "-o",
            f"{folder}/out",
            "--model",
            given.model,
            "--long-side",
            "native",
        ]
    )
predictor = denselab.load(given.model)
image = np.asarray(photo.resize((2000, 1500), Image.Resampling.BICUBIC))
whole = predictor.session.run(image)["class_ids"]
agreement = {
    f"tiles of {tile_px}": round(
        float((run_tiled(predictor.session, image, predictor.info.size_multiple, tile_px) == whole).mean()), 5
    )
    for tile_px in (TILE_PX, 1024)
}
write_result(
    given.out,
    {
        "12000x9000": {"wall_s": round(cost.wall_s, 1), "peak_mb": round(cost.peak_mb)},
        "2000x1500 tiled agrees with whole": agreement,
        "bar": {"peak_mb": 2048, "agreement": 0.995},
    },
)
