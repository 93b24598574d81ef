"""Like vitdet_vitl_lomar_25ep, for eight 24 GB GPUs: half the batch and rate, blocks recomputed in the backward pass.

    deepspeed downstream/detect/train_detector.py vitdet_vitl_lomar_25ep_24gb \
        start.checkpoint=runs/my-run data_root=/data/coco

A step is 32 images: 8 ranks x 1 x 4 micro-batches, and the learning rate is 1e-4 x 32 / 64, by the linear rule, which
is not derived for AdamW. This is expected to cost AP; how much was not measured. Recomputing changes only the time
(about a third more in the backbone), not the results; all our configurations use bf16. For the published batch of 64:
optim_wrapper.accumulative_counts=8 optim_wrapper.optimizer.lr=1e-4 param_scheduler.0.end=2000. By calculation it fits
in 24 GB; this was not measured. Not run by us.
"""

_base_ = ["vitdet_vitl_lomar_25ep.py"]

model = dict(backbone=dict(grad_checkpointing=True))
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=4, optimizer=dict(lr=5e-5))
auto_scale_lr = dict(base_batch_size=32)
warm_up = dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000)
param_scheduler = [warm_up, _base_.schedule_25ep[1]]
