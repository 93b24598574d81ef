"""UperNet, ViT-H pretrained with LoMaR, ADE20K, 160k iterations.

    deepspeed downstream/segment/train_segmentor.py upernet_vith_lomar_160k \
        start.checkpoint=runs/my-run data_root=/data/ade train.ds_config=zero1

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. No published number: LoMaR's papers report only ViT-B. Layer decay is within the 0.65 to 0.8 of other
recipes. Not run by us.
"""

_base_ = ["_base_/upernet.py"]

dim = 1280
model = dict(
    backbone=dict(arch="vit_huge", out_indices=(7, 15, 23, 31)),
    neck=dict(embed_dim=dim),
    decode_head=dict(in_channels=[dim, dim, dim, dim], channels=dim),
    auxiliary_head=dict(in_channels=dim),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
