"""What the commands that evaluate share: ranks, options, errors in one line, results as one JSON line."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from data.parallel import default_workers
from pretrain.trainer.launch import World, exit_process, find_world, init_distributed

Place = tuple[World, torch.device]


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of one rank at once")
    workers = max(default_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes of each rank that decode")


def run_on_ranks(command: Callable[[Place], dict[str, Any]]) -> NoReturn:
    """Runs `command` on every rank and prints what the main one's returns; exit code 1 with one line on errors."""
    try:
        world = find_world()
        result = command((world, init_distributed(world)))
        if world.is_main:
            print(json.dumps(result), flush=True)
        torch.distributed.barrier()  # a launcher may end the ranks that outlive the first to leave
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        exit_process(1)
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)
