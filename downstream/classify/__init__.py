"""Classifiers on encoders: fine-tuning, probes, training from scratch, by the engine and loop of pretraining."""
