"""ViTDet Mask R-CNN, ViT-H pretrained with MAE, COCO, 100 epochs: fixed positions, decomposed relative ones from zero.

    deepspeed downstream/detect/train_detector.py vitdet_vith_mae_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 32 ranks x 1 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. detectron2's ViTDet: 56.7 and 50.2 (box AP, mask AP; 75 epochs).
Not run by us. The published ViT-H encoders have patches of 14 pixels; their kernel is resized to 16 when loaded.
"""

_base_ = ["vitdet_vith_lomar_100ep.py"]

model = dict(backbone=dict(position="sincos"))
