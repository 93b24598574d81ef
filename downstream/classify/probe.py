"""How good an encoder is: `python -m downstream.classify.probe ENCODER --train DATA --val DATA`.

ENCODER is anything that `downstream.checkpoints.weights.load_encoder` reads; DATA is labeled shards or a folder of
class folders. It also runs with torchrun, srun or deepspeed, on any number of processes. The measures, from the
cheapest to the most informative:

    knn_top1, knn_top5    k-NN on frozen features, with DINO's weighted vote; knn_plain_top1 with equal votes
    linear_top1           ridge regression on frozen features
    attentive_top1, _top5 an attentive probe of the frozen patch tokens
    finetune_top1, _top5  a short fine-tuning of a copy, which costs some epochs of training: --finetune-epochs

k-NN and ridge regression rank masked image models wrongly. The last line of the output is a JSON object with these
numbers. `judge_by` names the one to compare encoders by: `finetune_top1`, or `attentive_top1` if the fine-tuning had
too few steps (`finetune_steps`); `judge_reason` says why.
"""

import argparse
from typing import Any, NoReturn, get_args

import torch

from data.image_folder import load_samples
from downstream.checkpoints.weights import build_encoder, read_encoder
from downstream.classify.evaluation_cli import add_loading_options, block_numbers, build_loader, run_on_ranks
from pretrain.models.features import check_blocks
from pretrain.models.sdpa import set_deterministic
from pretrain.probe.measure import check_sets, describe, probe
from pretrain.probe.settings import Pool, ProbeSettings
from pretrain.trainer.launch import World

FINETUNE_EPOCHS = 5


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    settings = ProbeSettings(**{name: getattr(options, name) for name in ProbeSettings.model_fields})
    train, val = load_samples(options.train), load_samples(options.val)
    check_sets(train, val, settings.k)
    found = read_encoder(options.encoder, weights=options.weights)
    encoder, _ = build_encoder(found, image_size=options.image_size)
    check_blocks(settings.block, len(encoder.blocks))
    size, format = encoder.image_size, encoder.pixels.format
    learned, classified = (build_loader(samples, size, options, world, format) for samples in (train, val))
    encoder = encoder.to(device)
    set_deterministic(True)
    measured = probe(encoder, learned, classified, settings, device=device, norm_after_pool=found.pool_norm)
    if world.is_main:
        print(describe(measured), flush=True)
    return measured


def _add_count(parser: argparse.ArgumentParser, name: str, lowest: int, default: int, meaning: str) -> None:
    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is too few: must be at least {lowest}")
        return int(text)

    parser.add_argument(name, type=number, default=default, metavar="N", help=meaning)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exits with 0 and one JSON line, or with 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = ProbeSettings()
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--train", required=True, metavar="DATA", help="the images to learn from")
    parser.add_argument("--val", required=True, metavar="DATA", help="the images to classify")
    _add_count(parser, "--k", 1, defaults.k, "neighbors that vote")
    parser.add_argument(
        "--pool",
        choices=get_args(Pool),
        default=defaults.pool,
        help="features for k-NN and ridge regression: mean of the patch tokens, class token (DINO), both concatenated, "
        "or the mean of class token and registers (prefix)",
    )
    parser.add_argument(
        "--block",
        type=block_numbers,
        default=(),
        metavar="N[,N...]",
        help="outputs of these blocks (1 is the first), concatenated; default: the encoder's, after its norm",
    )
    steps = "training steps of the attentive probe; 0: none"
    _add_count(parser, "--attentive-steps", 0, defaults.attentive_steps, steps)
    epochs = f"epochs of the short fine-tuning; 0: none, which saves most of the time; default: {FINETUNE_EPOCHS}"
    _add_count(parser, "--finetune-epochs", 0, FINETUNE_EPOCHS, epochs)
    images = "at most this many images of --train for the attentive probe and the fine-tuning"
    _add_count(parser, "--max-images", 1, defaults.max_images, images)
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="online, ema, or an encoder's name in the file; default: the one its authors evaluate",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images; default: the file's")
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
