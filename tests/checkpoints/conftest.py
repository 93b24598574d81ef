"""Fixture that shrinks the named encoder sizes."""

from helpers.tiny_archs import tiny_archs as tiny_archs
