"""Like upernet_vitl_lomar_160k, for eight 24 GB GPUs: blocks are recomputed in the backward pass.

    deepspeed downstream/segment/train_segmentor.py upernet_vitl_lomar_160k_24gb \
        start.checkpoint=runs/my-run data_root=/data/ade train.ds_config=zero2

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. Recomputing changes only the time (about a third more in the backbone), not the results. By
calculation it fits in 24 GB; this was not measured. Weights, gradients and AdamW states alone take 7 GB; ZeRO 2
partitions the last two. Not run by us.
"""

_base_ = ["upernet_vitl_lomar_160k.py"]

model = dict(backbone=dict(grad_checkpointing=True))
