"""ViTDet Mask R-CNN on mmdet."""
