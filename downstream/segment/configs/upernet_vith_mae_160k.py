"""UperNet, ViT-H pretrained by MAE or LUT, ADE20K, 160k iterations: absolute positions, relative ones from zero.

    deepspeed downstream/segment/train_segmentor.py upernet_vith_mae_160k \
        start.checkpoint=runs/my-run data_root=/data/ade train.ds_config=zero1

A step is 16 images: 8 ranks x 2 x 1 micro-batch. On other numbers of ranks, choose train_dataloader.batch_size so that
it stays 16. No published number. Layer decay is between the 0.65 and 0.8 of others. Not run by us. The published ViT-H
have patches of 14 pixels: their kernel is resized to 16 as it is loaded.
"""

_base_ = ["upernet_vith_lomar_160k.py"]

model = dict(backbone=dict(position="sincos"))
