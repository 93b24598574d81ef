"""k-NN and ridge regression on frozen features: `python -m downstream.classify.knn ENCODER --train DATA --val DATA`.

ENCODER is whatever `downstream.checkpoints.weights.load_encoder` reads, DATA labelled shards or a folder of class folders. Also by
torchrun, srun or deepspeed, on any number of processes. The last line is a JSON object: `knn_top1` and `knn_top5` with
DINO's weighted vote, `knn_plain_top1` where each neighbour counts the same, `linear_top1` of a ridge regression.
"""

import argparse
import functools
from typing import Any, NoReturn

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from downstream.checkpoints.weights import load_encoder
from downstream.classify.evaluation_cli import Place, add_loading_options, run_on_ranks
from pretrain.probe import check_sets, probe


def _command(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    world, device = place
    train, val = load_samples(options.train), load_samples(options.val)
    check_sets(train, val, options.k)
    encoder, _ = load_encoder(options.encoder, image_size=options.size, weights=options.weights)
    height, width = (side * encoder.patch_size for side in encoder.grid)
    known, asked = (
        EvalLoader(
            samples,
            size=(height, width),
            batch=options.batch,
            rank=world.rank,
            world_size=world.size,
            num_workers=options.workers,
        )
        for samples in (train, val)
    )
    return probe(encoder.to(device), known, asked, k=options.k, device=device, pool=options.pool)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--train", required=True, metavar="DATA", help="where neighbours are looked for")
    parser.add_argument("--val", required=True, metavar="DATA", help="what is asked for")
    parser.add_argument("--k", type=int, default=20, metavar="N", help="neighbours that vote")
    parser.add_argument("--pool", choices=("mean", "class"), default="mean", help="of patch tokens; class: DINO's")
    parser.add_argument("--weights", choices=("online", "ema"), help="default: what the method's authors evaluate")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: the file's")
    add_loading_options(parser)
    run_on_ranks(functools.partial(_command, parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
