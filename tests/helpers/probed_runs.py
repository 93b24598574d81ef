"""One rank that goes through complete runs of `pretrain/run.py`, with encoders of two narrow blocks."""

import gc
import json
import sys
import traceback
from pathlib import Path

from helpers.processes import SMALL
from pretrain.config import load
from pretrain.run import pretrain
from pretrain.trainer.launch import exit_process, find_world

if __name__ == "__main__":
    world = find_world()
    try:
        for arguments in json.loads(Path(sys.argv[1]).read_text()):
            with SMALL:
                pretrain(load(arguments[0], arguments[1:]), world)
            gc.collect()  # the hooks of an engine form reference cycles
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)
