"""Pretraining: image shards -> encoder weights.

`run.py` is the entry point. A method (`methods/`) is an `nn.Module` that owns encoder (`models/`), predictor and loss;
`build.py` makes it from a configuration (`config.py`, `recipes/`). `trainer/` trains it, as it does the classifiers of
`downstream/`: launch, engine, step loop, checkpoints, logs. `finish.py` writes the encoder at the end.
"""

from data.user import ensure_user

ensure_user()
