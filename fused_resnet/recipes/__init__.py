"""Recipes: images, the training loop and its checkpoints, for `fused-resnet train` and examples/."""
