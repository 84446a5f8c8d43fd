"""Adapters as PyTorch modules. Its modules import torch; this one doesn't."""
