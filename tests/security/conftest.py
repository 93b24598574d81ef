"""Tiny encoders under the name of a known size."""

from helpers.tiny_archs import tiny_archs as tiny_archs
