"""How long tests wait."""

import torch

# What a test waits for takes seconds, or minutes where other tests keep the cores busy: this only ends what hangs.
SECONDS = 240.0 if torch.cuda.is_available() else 900.0
