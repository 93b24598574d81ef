"""Like upernet_vitl_mae_160k, at 640 pixels.

    deepspeed downstream/segment/train_segmentor.py upernet_vitl_mae_160k_640 \
        start.checkpoint=runs/my-run data_root=/data/ade train.ds_config=zero1

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. BEiT's recipe uses 640 pixels. No published number for MAE. Not run by us.
"""

_base_ = ["upernet_vitl_mae_160k.py"]

size = 640
stride = 426
scale = (2560, 640)
