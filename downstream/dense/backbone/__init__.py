"""`PlainViT`, our encoder as a backbone of mmdet and mmseg, and loading a checkpoint into it."""
