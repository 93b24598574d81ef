"""UperNet, ViT-S pretrained with LoMaR, for one GPU and a few hundred to ten thousand of your photographs.

    python downstream/segment/train_segmentor.py upernet_vits_lomar_small \
        start.checkpoint=runs/my-run data_root=/data/fields classes='["soil", "wheat"]'

A step is 16 images: 1 rank x 8 x 2 micro-batches, in crops of 512 pixels. It trains for 10,000 steps (mmengine counts
20,000 micro-batches) and keeps the checkpoint with the best mIoU and the last two. Labels are numbered from 0; for
masks with 0 and 255: mask_values=[0,255]. For MAE's encoders: model.backbone.position=sincos. Batch and rate are
upernet_vitb_lomar_160k's; the number of steps is neither published nor tuned. Not run by us.
"""

_base_ = ["_base_/upernet.py"]

reduce_zero_label = False
dim = 384
model = dict(
    backbone=dict(arch="vit_small"),
    neck=dict(embed_dim=dim),
    decode_head=dict(in_channels=[dim, dim, dim, dim], channels=dim),
    auxiliary_head=dict(in_channels=dim),
)
train_dataloader = dict(batch_size=8, dataset=dict(type="OwnSegDataset"))
val_dataloader = dict(dataset=dict(type="OwnSegDataset"))
test_dataloader = val_dataloader
optim_wrapper = dict(accumulative_counts=2)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1000),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1000, end=20000),
]
train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(save_best="mIoU"), logger=dict(interval=10))
