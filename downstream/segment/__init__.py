"""UperNet and linear heads on mmseg."""
