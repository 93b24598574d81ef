"""ViTDet Mask R-CNN on ViT-B, COCO at 1024 pixels with large-scale jitter: mmdet's own configs with these changes.

If your own data set has COCO's format and layout (`annotations/instances_{train,val}2017.json`, `train2017/`,
`val2017/`), overrides are enough:

    data_root=/data/birds classes='["robin", "wren"]'

Otherwise write a config of your own. List classes in the order of the annotation file. When our commands load the
config, they copy `data_root`, `classes`, `size` and `with_masks` to wherever mmdet reads them (data sets, evaluators,
heads):

    _base_ = ["vitdet_vitb_lomar_25ep.py"]    # or its path
    data_root = "/data/birds/"
    classes = ("robin", "wren")
    train_dataloader = dict(dataset=dict(ann_file="train.json", data_prefix=dict(img="images/")))
    val_dataloader = dict(dataset=dict(ann_file="val.json", data_prefix=dict(img="images/")))
    test_dataloader = val_dataloader

Where the published recipe (detectron2's `mask_rcnn_vitdet_b_100ep`) and mmdet's defaults differ, this config follows
the recipe: 1024 pixels in training and evaluation, padded to a square; two convolutions in the RPN; layer norm in the
heads; no gradient clipping.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::common/lsj-100e_coco-instance.py"]
custom_imports = dict(
    imports=[
        "downstream.dense.backbone.loading",  # EncoderCheckpoint
        "downstream.dense.backbone.plain_vit",
        "downstream.dense.mmengine.layer_decay",
        "downstream.detect.coco_metric",
        "downstream.detect.pyramid",
    ]
)

data_root = "data/coco/"
classes = None  # COCO's
with_masks = True
size = 1024
norm = dict(type="LN2d")

model = dict(
    # mmdet's mean and deviation are ImageNet's, in RGB from 0 to 255, as in pretraining; it reads pixels as BGR.
    # Padding to a multiple of the image size makes every batch the square that the backbone is built for.
    data_preprocessor=dict(pad_size_divisor=size),
    backbone=dict(
        _delete_=True,
        type="PlainViT",
        arch="vit_base",
        patch_size=16,
        img_size=size,
        position="relative",
        window_size=14,
        global_blocks=(2, 5, 8, 11),
        out_indices=(11,),
        drop_path_rate=0.1,
        grad_checkpointing=False,
        init_cfg=None,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm),
        mask_head=dict(norm_cfg=norm),
    ),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(size, size), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    dataset=dict(  # read once per epoch; mmdet reads it four times
        _delete_=True,
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(num_workers=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type="AnyIdsCocoMetric")
test_evaluator = val_evaluator

# bf16 has the range of fp32 and needs no loss scale. Autocast keeps weights, norms, gradients and AdamW's states in
# fp32. Steps with a non-finite gradient are skipped. detectron2's recipe uses fp16.
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=1.0,
    accumulative_counts=2,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=0.7),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
auto_scale_lr = dict(base_batch_size=64, enable=False)

# mmengine's schedulers count micro-batches: two for each of the warm-up's 250 updates.
warm_up = dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500)
schedule_25ep = [warm_up, dict(type="MultiStepLR", by_epoch=True, begin=0, end=25, milestones=[22, 24], gamma=0.1)]
schedule_100ep = [warm_up, dict(type="MultiStepLR", by_epoch=True, begin=0, end=100, milestones=[89, 96], gamma=0.1)]
param_scheduler = schedule_25ep
train_cfg = dict(max_epochs=25, val_interval=5)

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))  # save_best="coco/segm_mAP" also keeps the best
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
randomness = dict(seed=0)
