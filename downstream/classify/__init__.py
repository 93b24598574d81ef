"""Encoders as classifiers of images."""
