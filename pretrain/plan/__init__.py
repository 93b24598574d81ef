"""What a recipe needs on given GPUs: memory, time, loader cores, and what limits; see docs/planning.md."""
