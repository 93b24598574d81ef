"""UperNet on ViT-B, ADE20K at 512 pixels, 160k iterations: mmseg's own configs with these changes.

A data set of your own needs overrides only if it has ADE20K's layout (images in `images/{training,validation}/`,
`annotations/{training,validation}/*.png`, the number of a class in each pixel of a mask, 255 where it has none):

    data_root=/data/fields classes='["soil", "wheat"]' reduce_zero_label=false

and else a config of your own. Classes are named in the order of their numbers, from 0, or from 1 with
`reduce_zero_label=true`, where 0 is no class, as in ADE20K. Masks with other numbers need `mask_values`, the number of
each class: `mask_values=[0,255]` where one of two classes is white. The keys at the top are copied to wherever mmseg
reads them (data sets, pipelines, heads, windows) when our commands load the config:

    _base_ = ["upernet_vitb_lomar_160k.py"]    # or its path
    data_root = "/data/fields/"
    classes = ("soil", "wheat")
    reduce_zero_label = False
    train_dataloader = dict(dataset=dict(data_prefix=dict(img_path="train/", seg_map_path="train_masks/")))
    val_dataloader = dict(dataset=dict(data_prefix=dict(img_path="val/", seg_map_path="val_masks/")))
    test_dataloader = val_dataloader

The recipe is mmseg's `mae-base_upernet_8xb2-amp-160k_ade20k-512x512`, with the settings of LUT's Table E. Two
things differ: relative position is the encoder's own (LoMaR's) or ViTDet's, from zero (MAE's encoders), and precision
is bf16. The last map is normalized as in pretraining; those of other blocks are not.
"""

_base_ = [
    "mmseg::_base_/models/upernet_mae.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]
custom_imports = dict(
    imports=[
        "downstream.dense.backbone.loading",  # EncoderCheckpoint
        "downstream.dense.backbone.plain_vit",
        "downstream.dense.mmengine.layer_decay",
        "downstream.segment.linear_head",
        "downstream.segment.own_dataset",
    ]
)

data_root = "data/ade/ADEChallengeData2016"
classes = None  # those of ADE20K
reduce_zero_label = True
mask_values = None  # 0, 1, 2, ...
size = 512
stride = 341
scale = (2048, 512)
norm = dict(type="RankBN")
dim = 768

model = dict(
    # mmseg's mean and deviation are ImageNet's in 0 to 255 and RGB, as in pretraining; it reads pixels as BGR.
    # Images of an evaluation are padded to a multiple of the stride of the coarsest map, 32.
    data_preprocessor=dict(size=(size, size), test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type="PlainViT",
        arch="vit_base",
        patch_size=16,
        img_size=size,
        position="relative",
        window_size=0,
        global_blocks=(),
        class_token=True,
        out_indices=(3, 5, 7, 11),
        drop_path_rate=0.1,
        grad_checkpointing=False,
        frozen=False,
        init_cfg=None,
    ),
    neck=dict(embed_dim=dim, norm_cfg=norm),
    decode_head=dict(in_channels=[dim, dim, dim, dim], channels=dim, num_classes=150, norm_cfg=norm),
    auxiliary_head=dict(in_channels=dim, num_classes=150, norm_cfg=norm),
    test_cfg=dict(mode="slide", crop_size=(size, size), stride=(stride, stride)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(size, size), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),  # after the resize: masks keep their size
    dict(type="PackSegInputs"),
]
# With `tta=true`. Ratios are of `scale`, as in BEiT and MAE, not of the files' sizes, as in mmseg.
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="RandomResize", scale=scale, ratio_range=(ratio, ratio), keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(batch_size=2, num_workers=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# bf16 has the range of fp32 and needs no loss scale; autocast keeps weights, norms, gradients and AdamW's states in
# fp32; a step with a gradient that is not finite is skipped.
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=1.0,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=0.65),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=16, enable=False)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
train_cfg = dict(max_iters=160000, val_interval=16000)

# save_best="mIoU" also keeps the best. A lost node costs at most 2000 iterations.
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2))
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
env_cfg = dict(cudnn_benchmark=False)  # or a resumed training would not have the same bits
randomness = dict(seed=0)
