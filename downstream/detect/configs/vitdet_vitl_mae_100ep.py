"""ViTDet Mask R-CNN, ViT-L pretrained with MAE, COCO, 100 epochs: fixed positions, decomposed relative ones from zero.

    deepspeed downstream/detect/train_detector.py vitdet_vitl_mae_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 16 ranks x 2 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. detectron2's ViTDet: 55.5 and 49.2 (box AP, mask AP). Not run by
us.
"""

_base_ = ["vitdet_vitl_lomar_100ep.py"]

model = dict(backbone=dict(position="sincos"))
