"""ViTDet Mask R-CNN, ViT-B pretrained with LoMaR, COCO, 100 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vitb_lomar_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. LoMaR's paper, Table 2: 51.4 box AP, 45.7 mask AP, for "25
epochs"; in ViTAE's code, the source of its baselines, an epoch reads COCO four times. The rate drops after 89 and 96
epochs, as in detectron2 (ViTAE's code: 88 and 96). Not run by us.
"""

_base_ = ["vitdet_vitb_lomar_25ep.py"]

train_cfg = dict(max_epochs=100)
param_scheduler = _base_.schedule_100ep
