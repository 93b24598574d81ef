"""Real trainings on mmengine, as those of detection: the same jobs and processes."""

import sys
from pathlib import Path

for folder in ("dense", "engine"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
