"""Does it help, and what does it cost? Small encoders pretrained with each method, then fine-tuned on few labels.

    python benchmarks/small_scale/run.py caltech101.tar OUT [--minutes 10] [--seeds 3] [--quick]
    python benchmarks/small_scale/run.py caltech101.tar OUT --gpu [--minutes 9.5] [--dry]

The tar has Caltech-101's photographs as train/CLASS (30 per class), val/CLASS (20 per class, for testing) and
extra/CLASS (the rest, for pretraining without labels). The first command is cpu.py's experiment, hours on two cores;
the second is gpu.py's, ten minutes on one GPU. The last line of the output is one JSON object.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="of each pretraining; with --gpu: in total")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the first variants; not with --gpu")
    parser.add_argument("--quick", action="store_true", help="only a few steps of each, to try it out")
    parser.add_argument("--gpu", action="store_true", help="a larger encoder for a set time on one GPU")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny, on a CPU, to try it out")
    options = parser.parse_args()
    options.tar, options.out = options.tar.absolute(), options.out.absolute()
    if options.gpu:
        from gpu import run  # imports all that trains
    else:
        from cpu import run
    run(options)


if __name__ == "__main__":
    main()
