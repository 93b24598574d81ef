"""A small Mask R-CNN on Penn-Fudan's 136 street photographs with people, to try everything on two CPU cores.

    python downstream/detect/train_detector.py vitdet_tiny_pennfudan \
        start.checkpoint=runs/my-run data_root=/data/pennfudan

A step is 4 images; an epoch has 34 steps. The heads are a quarter as wide as ViTDet's and get an eighth of the regions.
It is not a published recipe, and its AP says nothing about others. It runs in fp32, which is fastest on most CPUs.
"""

_base_ = ["_base_/vitdet.py"]

classes = ("person",)
size = 256
width = 64
extractor = dict(out_channels=width)
model = dict(
    data_preprocessor=dict(pad_size_divisor=size),
    backbone=dict(arch="vit_tiny", img_size=size, window_size=7),
    neck=dict(in_channels=192, out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=dict(in_channels=width, conv_out_channels=width, fc_out_channels=256),
        mask_roi_extractor=extractor,
        mask_head=dict(in_channels=width, conv_out_channels=width),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=200)),
)
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type="RandomResize", scale=(size, size), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(size, size), recompute_bbox=True),
    *_base_.train_pipeline[4:],
]
test_pipeline = [_base_.test_pipeline[0], dict(_base_.test_pipeline[1], scale=(size, size)), *_base_.test_pipeline[2:]]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=0.7),
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=12, val_interval=2)
default_hooks = dict(logger=dict(interval=10))
