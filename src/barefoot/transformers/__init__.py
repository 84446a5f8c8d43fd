"""``import barefoot.transformers``: transformers loads barefoot's folders, and keeps less of a long context.

    import barefoot.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("fitted/")
    cache = barefoot.transformers.KVCache(model, "h2o(keep=512) > q8")
    model.generate(ids, past_key_values=cache)

Importing registers the quantization method that the folders' config.json names, and the attention that
:class:`~barefoot.transformers.cache.KVCache` needs; neither changes what other models do.
"""

from barefoot.transformers.cache import KVCache
from barefoot.transformers.weights import BarefootConfig, BarefootQuantizer

__all__ = ["BarefootConfig", "BarefootQuantizer", "KVCache"]
