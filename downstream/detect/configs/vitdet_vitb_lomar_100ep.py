"""ViTDet Mask R-CNN, ViT-B pretrained by LoMaR, COCO, 100 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vitb_lomar_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. On other numbers of ranks, choose optim_wrapper.accumulative_counts
so that it stays 64. No published number. To compare with, detectron2's ViTDet on MAE's ViT-B: 51.6 and 45.9. Not run by
us.
"""

_base_ = ["vitdet_vitb_lomar_25ep.py"]

train_cfg = dict(max_epochs=100)
param_scheduler = _base_.schedule_100ep
