"""A small UperNet on CamVid's 123 frames of driving, to try everything on two CPU cores.

    python downstream/segment/train_segmentor.py upernet_tiny_camvid \
        start.checkpoint=runs/my-run data_root=/data/camvid

A step is 4 images: 1 rank x 4 x 1 micro-batch; there are 1500 steps. The heads are 64 channels wide and see windows of
256 pixels. It is not a published recipe, and its mIoU says nothing about others. It runs in fp32, which is fastest on
most CPUs.
"""

_base_ = ["_base_/upernet.py"]

classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
reduce_zero_label = False
size = 256
stride = 170
scale = (1024, 256)
dim = 192
width = 64
model = dict(
    backbone=dict(arch="vit_tiny"),
    neck=dict(embed_dim=dim),
    decode_head=dict(in_channels=[dim, dim, dim, dim], channels=width),
    auxiliary_head=dict(in_channels=dim, channels=width),
)
train_dataloader = dict(batch_size=4, num_workers=1)
val_dataloader = dict(num_workers=1)
test_dataloader = val_dataloader
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=0.65),
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=1500),
]
train_cfg = dict(max_iters=1500, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=250), logger=dict(interval=10))
