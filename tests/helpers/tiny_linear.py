"""A linear head on the frozen encoder of tiny_upernet, as in the shipped linear configs."""

_base_ = ["tiny_upernet.py"]

model = dict(
    backbone=dict(out_indices=(11,), frozen=True),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="LinearHead",
        in_channels=192,
        in_index=0,
        num_classes=3,
        norm_cfg=dict(type="RankBN"),
    ),
    auxiliary_head=None,
)
