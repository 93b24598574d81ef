"""Images in tar shards -> batches of uint8 pixels, in an order that is a pure function of (seed, epoch).

How bytes become batches, in five steps:

1. ``pack`` copies image files unchanged into WebDataset shards (or somebody else already did).
2. ``index`` lists, once, in which shard and at which byte every sample lies. The index alone says how many samples and
   steps an epoch has, on every rank, before the first step.
3. ``order`` shuffles all samples of an epoch and cuts the result into global batches, micro-batches and ranks: no I/O,
   no state. What a step trains on depends on (seed, step, global batch) and on nothing else.
4. ``reader`` fetches one sample's bytes with one ``pread``; ``decode`` turns them into the pixels of one crop, which
   ``transforms`` drew from a generator seeded by (seed, epoch, sample).
5. ``loader`` does 3 and 4 in worker processes and hands out one list of micro-batches a step.

So nothing random needs saving, and a run that resumes at step s, with other ranks or workers, sees what it would have
seen. Nothing here imports ``pretrain``.
"""
