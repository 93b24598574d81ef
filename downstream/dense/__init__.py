"""What detection and segmentation share: encoders as mmdet and mmseg backbones, and mmengine on DeepSpeed."""
