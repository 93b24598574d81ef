"""Encoder weights -> task models: loading any known checkpoint, exporting to others."""

from data.user import ensure_user

ensure_user()
