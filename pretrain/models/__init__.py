"""Vision Transformers that know nothing of masking: a method decides what enters them."""
