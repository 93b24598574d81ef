"""k-NN and ridge regression on frozen features: `python -m downstream.classify.knn ENCODER --train DATA --val DATA`.

ENCODER is whatever `downstream.checkpoints.weights.load_encoder` reads; DATA is labeled shards or a folder of class
folders. Also with torchrun, srun or deepspeed, on any number of processes. The last line of the output is a JSON
object: `knn_top1` and `knn_top5` with DINO's weighted vote, `knn_plain_top1` with equal votes, and `linear_top1` of a
ridge regression.
"""

import argparse
from typing import Any, NoReturn

import torch

from data.image_folder import load_samples
from downstream.checkpoints.weights import build_encoder, read_encoder
from downstream.classify.evaluation_cli import add_loading_options, build_loader, run_on_ranks
from pretrain.probe import check_sets, probe
from pretrain.trainer.launch import World


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    train, val = load_samples(options.train), load_samples(options.val)
    check_sets(train, val, options.k)
    found = read_encoder(options.encoder, weights=options.weights)
    encoder, _ = build_encoder(found, image_size=options.image_size)
    bank, queries = (build_loader(samples, encoder.image_size, options, world) for samples in (train, val))
    return probe(
        encoder.to(device),
        bank,
        queries,
        k=options.k,
        device=device,
        pool=options.pool,
        norm_after_pool=found.pool_norm,
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--train", required=True, metavar="DATA", help="where neighbors are searched")
    parser.add_argument("--val", required=True, metavar="DATA", help="what is classified")
    parser.add_argument("--k", type=int, default=20, metavar="N", help="neighbors that vote")
    parser.add_argument(
        "--pool", choices=("mean", "class"), default="mean", help="mean of the patch tokens, or the class token (DINO)"
    )
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="online, ema, or an encoder's name; default: what its authors evaluate",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: that of the file")
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
