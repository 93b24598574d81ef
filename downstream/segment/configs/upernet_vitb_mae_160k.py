"""UperNet, ViT-B pretrained with MAE or LUT, ADE20K, 160k iterations: absolute positions, relative ones from zero.

    deepspeed downstream/segment/train_segmentor.py upernet_vitb_mae_160k \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. MAE's paper: 48.1 mIoU. LUT's encoders, in LUT's paper: 49.5. 800 epochs of MAE with PR-MIM, in
PR-MIM's paper: 46.9, with a layer decay of 0.75. Not run by us.
"""

_base_ = ["upernet_vitb_lomar_160k.py"]

model = dict(backbone=dict(position="sincos"))
