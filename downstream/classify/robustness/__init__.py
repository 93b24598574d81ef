"""Robustness of ImageNet classifiers on the published sets: `python -m downstream.classify.robustness`."""
