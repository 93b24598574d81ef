"""UperNet on ViT-B, ADE20K at 512 pixels, 160k iterations: mmseg's own configs with these changes.

If your own data set has ADE20K's layout (images in `images/{training,validation}/`, masks in
`annotations/{training,validation}/*.png`, each mask pixel a class number, or 255 for no class), overrides are enough:

    data_root=/data/fields classes='["soil", "wheat"]' reduce_zero_label=false

Otherwise write a config of your own. List classes in the order of their numbers, from 0, or from 1 with
`reduce_zero_label=true`, where 0 is no class, as in ADE20K. For masks with other numbers, `mask_values` gives the
number of each class: `mask_values=[0,255]` if one of two classes is white. When our commands load the config, they copy
the top-level keys to wherever mmseg reads them (data sets, pipelines, heads, windows):

    _base_ = ["upernet_vitb_lomar_160k.py"]    # or its path
    data_root = "/data/fields/"
    classes = ("soil", "wheat")
    reduce_zero_label = False
    train_dataloader = dict(dataset=dict(data_prefix=dict(img_path="train/", seg_map_path="train_masks/")))
    val_dataloader = dict(dataset=dict(data_prefix=dict(img_path="val/", seg_map_path="val_masks/")))
    test_dataloader = val_dataloader

The recipe is mmseg's `mae-base_upernet_8xb2-amp-160k_ade20k-512x512`, with the settings of LUT's Table E. It differs in
two ways: relative position is the encoder's own (LoMaR) or ViTDet's, starting at zero (MAE's encoders), and precision
is bf16. The last block's map is normalized as in pretraining; those of other blocks are not.
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
classes = None  # ADE20K's
reduce_zero_label = True
mask_values = None  # 0, 1, 2, ...
size = 512
stride = 341
scale = (2048, 512)
norm = dict(type="RankBN")
dim = 768

model = dict(
    # mmseg's mean and deviation are ImageNet's, in RGB from 0 to 255, as in pretraining; it reads pixels as BGR.
    # Evaluation images are padded to a multiple of 32, the stride of the coarsest map.
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
    dict(type="LoadAnnotations"),  # after the resize, so that masks keep their size
    dict(type="PackSegInputs"),
]
# For `tta=true`. Ratios are relative to `scale`, as in BEiT and MAE, not to the images' own sizes, as in mmseg.
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

# bf16 has the range of fp32 and needs no loss scale. Autocast keeps weights, norms, gradients and AdamW's states in
# fp32. Steps with a non-finite gradient are skipped.
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

# save_best="mIoU" also keeps the best checkpoint. A lost node costs at most 2000 iterations.
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2))
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
env_cfg = dict(cudnn_benchmark=False)  # otherwise a resumed training would not be bit-identical
randomness = dict(seed=0)
