"""Like upernet_vitb_lomar_160k, for eight 24 GB GPUs: blocks are recomputed in the backward pass.

    deepspeed downstream/segment/train_segmentor.py upernet_vitb_lomar_160k_24gb \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. Recomputing changes only the time (about a third more in the backbone), not the results. By
calculation it fits in 24 GB; this was not measured. Not run by us.
"""

_base_ = ["upernet_vitb_lomar_160k.py"]

model = dict(backbone=dict(grad_checkpointing=True))
