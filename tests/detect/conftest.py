"""Real configs on a small real set, both of which the tests of tests/dense share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dense"))
