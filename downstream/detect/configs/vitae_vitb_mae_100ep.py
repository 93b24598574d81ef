"""Like vitdet_vitb_mae_100ep, with ViTAE's convolutions parallel to the attention of each block.

    deepspeed downstream/detect/train_detector.py vitae_vitb_mae_100ep \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. LoMaR's paper, Table 2: 51.6 box AP, 45.8 mask AP, for "25
epochs"; in ViTAE's code, the source of its baselines, an epoch reads COCO four times. The rate drops after 89 and 96
epochs, as in detectron2 (ViTAE's code: 88 and 96). Not run by us.
"""

_base_ = ["vitdet_vitb_mae_100ep.py"]

model = dict(backbone=dict(parallel_conv=True))
