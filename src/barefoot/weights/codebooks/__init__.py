"""Formats of learned levels: clustering of weights, and codebooks that are trained together with their mappings."""
