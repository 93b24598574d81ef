"""One linear layer on the last block of a frozen ViT-B pretrained with LoMaR, ADE20K, 40k iterations.

    deepspeed downstream/segment/train_segmentor.py linear_vitb_lomar_40k \
        start.checkpoint=runs/my-run data_root=/data/ade

A step is 16 images: 8 ranks x 2 x 1 micro-batch. With another number of ranks, choose train_dataloader.batch_size so
that it stays 16. DINOv2's linear protocol: batch normalization and one linear layer, AdamW with a learning rate of 1e-3
and a weight decay of 1e-4. No published number for LoMaR. Not run by us.
"""

_base_ = ["_base_/upernet.py"]

model = dict(
    backbone=dict(out_indices=(11,), frozen=True),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="LinearHead",
        in_channels=_base_.dim,
        in_index=0,
        num_classes=150,
        norm_cfg=_base_.norm,
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=1.0), optimizer=dict(lr=1e-3, weight_decay=1e-4))
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=40000)]
train_cfg = dict(max_iters=40000, val_interval=4000)
