"""Seeds what a module draws by itself, so that no state of a random generator need be saved."""

import random

import numpy as np
import torch


def seed_step(*key: int) -> None:
    """Seeds what a module draws by itself (drop path, mixup) by this key alone: no generator state needs saving."""
    (word,) = np.random.SeedSequence(key).generate_state(1)
    torch.manual_seed(int(word))
    np.random.seed(word)
    random.seed(int(word))
