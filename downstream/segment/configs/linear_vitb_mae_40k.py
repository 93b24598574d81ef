"""Like linear_vitb_lomar_40k, for encoders pretrained with MAE or LUT: absolute positions.

    deepspeed downstream/segment/train_segmentor.py linear_vitb_mae_40k \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. No published number. Not run by us.
"""

_base_ = ["linear_vitb_lomar_40k.py"]

model = dict(backbone=dict(position="sincos"))
