"""The timeout of tests."""

import torch

# Tests wait for seconds, or minutes if other tests keep the cores busy. The timeout only ends what hangs.
SECONDS = 240.0 if torch.cuda.is_available() else 900.0
