"""`PlainViT`, our encoder as a backbone of mmdet and mmseg, and how a checkpoint is loaded into it."""
