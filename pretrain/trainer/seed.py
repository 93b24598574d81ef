"""Seeds what modules draw themselves, so that no state of a random generator needs to be saved."""

import random

import numpy as np
import torch


def seed_step(*key: int) -> None:
    """Seeds what modules draw themselves (drop path, mixup) from this key alone."""
    (word,) = np.random.SeedSequence(key).generate_state(1)
    torch.manual_seed(int(word))
    np.random.seed(word)
    random.seed(int(word))
