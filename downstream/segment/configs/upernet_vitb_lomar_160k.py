"""UperNet, ViT-B pretrained with LoMaR, ADE20K, 160k iterations.

    deepspeed downstream/segment/train_segmentor.py upernet_vitb_lomar_160k \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. LoMaR's abstract reports 0.2 mIoU more than MAE's encoder, for which MAE's paper reports 48.1. Not run
by us.
"""

_base_ = ["_base_/upernet.py"]
