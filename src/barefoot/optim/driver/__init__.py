"""Optimizers in PyTorch. Its modules import torch; this one doesn't."""
