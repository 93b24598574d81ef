"""Images in tar shards -> batches of pixels, in an order that is a pure function of (seed, epoch).

From bytes to batches, in five steps:

1. ``pack`` copies image files unchanged into WebDataset shards (or you already have shards).
2. ``index`` records, once, the shard and the byte offset of every sample. From the index alone every rank knows, before
   the first step, how many samples and steps an epoch has.
3. ``order`` shuffles all samples of an epoch and cuts the result into global batches, micro-batches and ranks: no I/O,
   no state. The samples of a step depend only on (seed, step, global batch, repeats, group size).
4. ``reader`` fetches one sample's bytes with one ``pread``; ``decode`` turns them into the pixels of its crops, which
   ``transforms`` drew from a generator seeded by (seed, epoch, sample).
5. ``loader`` does 3 in the main process and 4 in worker processes, and yields one list of micro-batches per step.

So no random state needs saving, and a run that resumes at step s, with a different number of ranks or workers, trains
on the same batches as one that was never interrupted. Nothing here imports ``pretrain``.
"""

from data.user import ensure_user

ensure_user()
