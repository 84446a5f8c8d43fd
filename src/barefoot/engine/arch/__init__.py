"""Architectures: one file each, found because it lies here.

A file states ``HF_TYPES`` (model types of config.json that it reads) and ``GGUF_ARCHS`` (values of
``general.architecture``), and gives ``from_hf(config, tensors)`` and ``from_gguf(metadata, tensors)``, which return a
:class:`~barefoot.core.model.ModelSpec`; ``to_hf(spec)`` and ``to_gguf(spec)`` give the headers that these read.
``tensors`` maps names to (format, shape), or is None when only a header is known.
"""
