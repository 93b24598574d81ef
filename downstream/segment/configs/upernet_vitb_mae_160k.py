"""UperNet, ViT-B pretrained by MAE or LUT, ADE20K, 160k iterations: absolute positions, relative ones from zero.

    deepspeed downstream/segment/train_segmentor.py upernet_vitb_mae_160k \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. On other numbers of ranks, choose train_dataloader.batch_size so that
it stays 16. MAE's paper: 48.1 mIoU; LUT's encoders: 49.5 by LUT's paper; MAE of 800 epochs with PR-MIM: 46.9 by
PR-MIM's, with a layer decay of 0.75. Not run by us.
"""

_base_ = ["upernet_vitb_lomar_160k.py"]

model = dict(backbone=dict(position="sincos"))
