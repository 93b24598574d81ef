"""Pretraining: image shards -> encoder weights.

`run.py` is the entry point. A method (`methods/`) is an `nn.Module` that owns the encoder (`models/`), the
predictor and the loss; `build.py` builds it from a configuration (`config.py`, `recipes/`). `trainer/` trains it, and
also the classifiers of `downstream/`: launch, engine, step loop, checkpoints, logs. `finish.py` writes the encoder.
"""

from data.user import ensure_user

ensure_user()
