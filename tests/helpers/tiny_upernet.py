"""The shipped tiny UperNet, shrunk so that two CPU processes train it quickly on the data of tiny_ade."""

_base_ = ["../../downstream/segment/configs/upernet_tiny_camvid.py"]

data_root = "ade/"
classes = ("ground", "disc", "box")
size = 64
stride = 43
scale = (256, 64)
width = 16
model = dict(decode_head=dict(channels=width), auxiliary_head=dict(channels=width))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
# With 1e-8, gradients that are only rounding errors, as of a bias before a norm, would cause steps of full size.
optim_wrapper = dict(optimizer=dict(lr=1e-3, eps=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=2),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=2, end=6),
]
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=4), logger=dict(interval=1))
visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
