"""ViTDet Mask R-CNN, ViT-H pretrained with LoMaR, COCO, 100 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vith_lomar_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco train.ds_config=zero1

A step is 64 images: 32 ranks x 1 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number. For comparison, detectron2's ViTDet on MAE's
ViT-H: 56.7 and 50.2 (75 epochs). Not run by us.
"""

_base_ = ["vitdet_vith_lomar_25ep.py"]

train_cfg = dict(max_epochs=100)
param_scheduler = _base_.schedule_100ep
