"""Semantic segmentation with trained heads: the heads, a plain ViT under UPerNet, inference by sliding windows."""
