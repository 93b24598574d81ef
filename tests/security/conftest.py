"""`vit_tiny` and its timm counterpart are replaced by even smaller models."""

from helpers.tiny_archs import tiny_archs as tiny_archs
