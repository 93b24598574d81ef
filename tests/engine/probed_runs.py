"""One rank that goes through whole runs of `pretrain/run.py`, with encoders of two narrow blocks."""

import gc
import json
import sys
import traceback
from pathlib import Path

from processes import SMALL

from pretrain.config import load
from pretrain.launch import find_world, leave
from pretrain.run import pretrain

if __name__ == "__main__":
    world = find_world()
    try:
        for arguments in json.loads(Path(sys.argv[1]).read_text()):
            with SMALL:
                pretrain(load(arguments[0], arguments[1:]), world)
            gc.collect()  # an engine's hooks hold it in cycles
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)
