"""ViTDet Mask R-CNN, ViT-B pretrained with LoMaR, COCO, 25 epochs.

    deepspeed downstream/detect/train_detector.py vitdet_vitb_lomar_25ep \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number: each of the "25 epochs" in LoMaR's paper
reads COCO four times, as in vitdet_vitb_lomar_100ep. Not run by us.
"""

_base_ = ["_base_/vitdet.py"]
