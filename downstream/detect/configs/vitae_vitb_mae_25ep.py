"""Like vitdet_vitb_mae_25ep, with ViTAE's convolutions parallel to the attention of each block.

    deepspeed downstream/detect/train_detector.py vitae_vitb_mae_25ep \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number: each of the "25 epochs" in LoMaR's paper
reads COCO four times, as in vitae_vitb_mae_100ep. Not run by us.
"""

_base_ = ["vitdet_vitb_mae_25ep.py"]

model = dict(backbone=dict(parallel_conv=True))
