"""The training loop, DeepSpeed, checkpoints and Ray Train around them."""
