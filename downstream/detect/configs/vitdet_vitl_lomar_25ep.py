"""ViTDet Mask R-CNN, ViT-L pretrained with LoMaR, COCO, 25 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vitl_lomar_25ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 16 ranks x 2 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number: LoMaR's paper reports only ViT-B. Not run by
us.
"""

_base_ = ["_base_/vitdet.py"]

model = dict(
    backbone=dict(arch="vit_large", global_blocks=(5, 11, 17, 23), out_indices=(23,), drop_path_rate=0.4),
    neck=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
train_dataloader = dict(batch_size=2)
