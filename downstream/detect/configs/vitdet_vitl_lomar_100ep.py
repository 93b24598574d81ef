"""ViTDet Mask R-CNN, ViT-L pretrained with LoMaR, COCO, 100 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vitl_lomar_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 16 ranks x 2 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number. For comparison, detectron2's ViTDet on MAE's
ViT-L: 55.5 and 49.2. Not run by us.
"""

_base_ = ["vitdet_vitl_lomar_25ep.py"]

train_cfg = dict(max_epochs=100)
param_scheduler = _base_.schedule_100ep
