"""Measuring quality: perplexity, divergence from a reference, references that privilege no grid."""
