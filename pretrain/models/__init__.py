"""Vision Transformers and their parts, independent of masking: a method decides which tokens enter them."""
