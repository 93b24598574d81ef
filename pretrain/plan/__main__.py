"""Plans a pretraining run without a GPU or images: memory, time, loader cores, and what limits it.

    python -m pretrain.plan lomar_vitb16_224_400e --gpus 8 --gpu h100
    python -m pretrain.plan lomar_vith14_224_1600e train.ds_config=zero3 --gpus 64 --gpu a100 --images 1000000000

Nothing is measured: docs/planning.md has the formulas and their known errors.
"""

import argparse
import json
import os
import sys

from data.parallel import print_error
from pretrain.plan.hardware import GPUS, build_cluster

IMAGES = 1_281_167  # images of ImageNet-1K


def main() -> int:
    """Returns exit code 0, or 1 after one line that names what to change."""
    options = _parser().parse_intermixed_args()
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, or it warns that there is no GPU
    from data.index import load_index
    from pretrain.config import load
    from pretrain.plan.advice import advise
    from pretrain.plan.estimate import check_gpus, choose_numerics, make_plan
    from pretrain.plan.loader_cost import IMAGENET, Photographs
    from pretrain.plan.table import as_json, render
    from pretrain.plan.trace import trace_sizes

    try:
        if options.images is not None and options.images < 1:
            raise ValueError(f"--images {options.images} must be at least 1")
        cluster = build_cluster(options.gpu, options.gpus, options.gpus_per_node, options.link)
        config = load(options.recipe, ["data.shards=unused", *options.overrides])
        check_gpus(config, cluster)
        images, photographs = IMAGES, IMAGENET
        if any(override.startswith("data.shards=") for override in options.overrides):
            index = load_index(config.data.shards)
            images, photographs = len(index), Photographs(float(index.length.mean()), index.shrunk)
        (*earlier, trace), numerics = trace_sizes(config), choose_numerics(config, cluster)
        plan = make_plan(config, cluster, options.images or images, numerics, trace, earlier, photographs)
    except ValueError as error:
        print_error(error)
        return 1
    advice = advise(plan)
    print(json.dumps(as_json(plan, options.gpu, advice)) if options.json else render(plan, options.gpu, advice))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe of pretrain/recipes, or a YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--gpus", type=int, required=True, help="total number of GPUs")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node (default: 8, or all if fewer)")
    parser.add_argument(
        "--link",
        type=float,
        metavar="GBITS",
        help="total Gb/s of a node's network adapters (default: usual for the GPU)",
    )
    parser.add_argument(
        "--images", type=int, help="training images (default: those in data.shards=..., if given, or ImageNet-1K's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
