"""barefoot: neural networks inside a stated memory budget."""

__version__ = "0.1.0"
