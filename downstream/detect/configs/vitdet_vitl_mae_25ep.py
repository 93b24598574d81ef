"""ViTDet Mask R-CNN, ViT-L pretrained with MAE, COCO, 25 epochs: fixed positions, decomposed relative ones from zero.

    deepspeed downstream/detect/train_detector.py vitdet_vitl_mae_25ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 16 ranks x 2 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number for 25 epochs. Not run by us.
"""

_base_ = ["vitdet_vitl_lomar_25ep.py"]

model = dict(backbone=dict(position="sincos"))
