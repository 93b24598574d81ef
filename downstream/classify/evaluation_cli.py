"""What the evaluating commands share: options, ranks, one-line errors, and the result as one JSON line."""

import argparse
import json
import os
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from data.cores import available_cores
from data.eval_loader import EvalLoader
from data.image_folder import Samples
from data.parallel import print_error
from data.pixel_format import PixelFormat
from pretrain.trainer.launch import World, exit_process, find_world, init_distributed

Command = Callable[[argparse.Namespace, World, torch.device], dict[str, Any]]


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size and --num-workers."""
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch on each rank")
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # of this node: torchrun, deepspeed
    workers = max(available_cores() // int(ranks), 1)
    parser.add_argument("--num-workers", type=int, default=workers, metavar="N", help="decoding processes per rank")


def block_numbers(text: str) -> tuple[int, ...]:
    """Parses an option such as `8` or `4,8,12`."""
    return tuple(int(number) for number in text.split(","))


def build_loader(
    samples: Samples, size: tuple[int, int], options: argparse.Namespace, world: World, format: PixelFormat
) -> EvalLoader:
    """A loader of all samples as central crops of (H, W), using the options of `add_loading_options`."""
    return EvalLoader(
        samples,
        size=size,
        batch=options.batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=options.num_workers,
        format=format,
    )


def run_on_ranks(command: Command, options: argparse.Namespace) -> NoReturn:
    """Runs `command` on every rank and prints the main rank's result; an error prints one line and exits with 1.

    Args:
        command: (options, world, device) -> the result.
        options: the parsed command line.
    """
    try:
        world = find_world()
        result = command(options, world, init_distributed(world))
        if world.is_main:
            print(json.dumps(result), flush=True)
        torch.distributed.barrier()  # a launcher may kill the other ranks when the first one exits
    except (ValueError, OSError) as error:
        print_error(error)
        exit_process(1)
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)
