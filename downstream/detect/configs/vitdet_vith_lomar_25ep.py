"""ViTDet Mask R-CNN, ViT-H pretrained with LoMaR, COCO, 25 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vith_lomar_25ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 32 ranks x 1 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number: LoMaR's paper reports only ViT-B. Not run by
us.
"""

_base_ = ["_base_/vitdet.py"]

model = dict(
    backbone=dict(arch="vit_huge", global_blocks=(7, 15, 23, 31), out_indices=(31,), drop_path_rate=0.5),
    neck=dict(in_channels=1280),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.9))
train_dataloader = dict(batch_size=1)
