"""Like upernet_vitb_mae_160k, but the encoder stays frozen.

    deepspeed downstream/segment/train_segmentor.py upernet_vitb_mae_160k_frozen \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. Neck and heads are trained; the encoder is in eval mode. No published number. Not run by us.
"""

_base_ = ["upernet_vitb_mae_160k.py"]

model = dict(backbone=dict(frozen=True))
