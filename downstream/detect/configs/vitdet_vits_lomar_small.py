"""ViTDet Mask R-CNN, ViT-S pretrained with LoMaR, for one GPU and a few hundred to ten thousand of your photographs.

    python downstream/detect/train_detector.py vitdet_vits_lomar_small \
        start.checkpoint=runs/my-run data_root=/data/birds classes='["robin", "wren"]'

A step is 16 images: 1 rank x 8 x 2 micro-batches, at 640 pixels. It trains for 50 epochs and keeps the checkpoint with
the best box AP and the last two. If the annotations have no masks: with_masks=false. For MAE's encoders:
model.backbone.position=sincos. For less memory: train_dataloader.batch_size=4 optim_wrapper.accumulative_counts=4
param_scheduler.0.end=1000. Batch, rate and epochs lie between those of ViTDet and vitdet_tiny_pennfudan; they are
neither published nor tuned. Not run by us.
"""

_base_ = ["_base_/vitdet.py"]

size = 640
model = dict(backbone=dict(arch="vit_small"), neck=dict(in_channels=384))
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type="RandomResize", scale=(size, size), ratio_range=(0.5, 2.0), keep_ratio=True),
    *_base_.train_pipeline[3:],
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=16)
param_scheduler = [
    _base_.warm_up,
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=50, milestones=[40, 47], gamma=0.1),
]
train_cfg = dict(max_epochs=50)
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"), logger=dict(interval=10))
