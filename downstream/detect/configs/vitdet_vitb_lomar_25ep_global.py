"""Like vitdet_vitb_lomar_25ep, but every block attends to the whole image.

    deepspeed downstream/detect/train_detector.py vitdet_vitb_lomar_25ep_global \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 64 images: 8 ranks x 4 x 2 micro-batches. With another number of ranks, choose
optim_wrapper.accumulative_counts so that it stays 64. No published number for LoMaR. Not run by us.
"""

_base_ = ["vitdet_vitb_lomar_25ep.py"]

model = dict(backbone=dict(window_size=0, global_blocks=()))
