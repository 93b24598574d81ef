"""Shards -> encoder weights.

`run.py` is the entry and `loop.py` the one step loop for every method. A method (`methods/`) is an `nn.Module` that
owns encoder, predictor and loss; `engine.py` wraps it in a DeepSpeed engine; `checkpoint.py` saves and resumes it.
"""
