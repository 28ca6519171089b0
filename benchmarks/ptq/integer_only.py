"""I-ViT: are its three engines equal to the last bit, and what does a network of integers alone cost in accuracy?

python benchmarks/ptq/integer_only.py [--testbed cifar_vit] [--work runs/proofs] [--threads 2] [--images 100]

Writes benchmarks/results/ptq/integer_only_TESTBED.json.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from testbeds import ROOT, TESTBEDS, captured, read_split

from denselab.compress.integer.program_onnx import ProgramFile, write_program
from denselab.compress.methods.i_vit import I_VIT
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observing import observe
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="cifar_vit", choices=["cifar_vit", "cifar_swin"])
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=100, help="compared in all three engines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    testbed = TESTBEDS[args.testbed]
    subject = testbed.subject(args.work)
    photos = testbed.photos(subject, args.work)
    score = testbed.scorer(subject, args.work)
    graph = captured(subject.network, next(iter(photos)))
    stats, calibration = observe(graph, photos), Calibration(photos, subject.change)
    program = I_VIT.quantize(graph, stats, calibration)
    file = args.work / f"{testbed.name}_ivit.onnx"
    write_program(program, file)
    images, _ = read_split("test")
    codes = program.image_code.stored(subject.pixels(images[:: len(images) // args.images][: args.images]).numpy())
    by_numpy = program.run(codes)
    by_torch = program.run(torch.from_numpy(codes)).numpy()
    by_onnx = ProgramFile(file, threads=args.threads).run(codes)
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 8, 8))
    int8 = score(MIN_MAX.quantize(graph, stats, plan, calibration).as_module().eval())
    write_json(
        ROOT / "benchmarks" / "results" / "ptq" / f"integer_only_{testbed.name}.json",
        {
            "command": f"python benchmarks/ptq/integer_only.py --testbed {testbed.name}",
            "images_compared": len(codes),
            "numpy_equals_torch": bool(np.array_equal(by_numpy, by_torch)),
            "numpy_equals_onnxruntime": bool(np.array_equal(by_numpy, by_onnx)),
            "dtype_of_logits": str(by_numpy.dtype),
            "float_top1": score(subject.network).value,
            "int8_minmax_top1": int8.value,
            "i_vit_top1": score(program.as_module().eval()).value,
            "file_bytes": file.stat().st_size,
        },
    )
    print((ROOT / "benchmarks" / "results" / "ptq" / f"integer_only_{testbed.name}.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
