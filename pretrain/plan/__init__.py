"""What a recipe needs on given GPUs: memory, time, loader cores, and what limits it; see docs/planning.md."""
