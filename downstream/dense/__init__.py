"""What detection and segmentation share: encoders as backbones of mm*, and mmengine on DeepSpeed."""
