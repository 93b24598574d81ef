"""Encoder weights -> task models: loading any known checkpoint, exporting to others."""
