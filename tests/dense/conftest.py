"""Real trainings on mmengine need the processes that those of pretraining have."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))
