"""UperNet, ViT-H pretrained with MAE or LUT, ADE20K, 160k iterations: absolute positions, relative ones from zero.

    deepspeed downstream/segment/train_segmentor.py upernet_vith_mae_160k \
        start.checkpoint=runs/my-run data_root=/data/ade train.ds_config=zero1

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. No published number. Layer decay is within the 0.65 to 0.8 of other recipes. Not run by us. The
published ViT-H encoders have patches of 14 pixels; their kernel is resized to 16 when loaded.
"""

_base_ = ["upernet_vith_lomar_160k.py"]

model = dict(backbone=dict(position="sincos"))
