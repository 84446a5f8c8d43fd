"""Drivers that know a framework, PyTorch and transformers. Importing this package imports neither: it is not the public
module, which is :mod:`barefoot.transformers`."""
