"""Image classification: fine-tuning, probes, training from scratch, and every kind of classifier evaluation."""
