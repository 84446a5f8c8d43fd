"""The driver of KV policies and stores in transformers: a cache for any decoder that attends by sdpa.

    cache = KVCache(model, "snapkv(keep=1024) > kivi(bits=2)")
    model.generate(ids, past_key_values=cache, max_new_tokens=200)

Compositions, policies and rows are the engine's (:mod:`barefoot.kv`). A prompt, which is several tokens at once or the
first one, passes a layer as it was computed; then the policy chooses what stays, others may merge into that, and it is
stored. A decoded token is stored, attended to with all others, and the policy may send entries away. Softmax is over
what is there; keys keep the rotation of their positions, and positions go on counting all tokens. Layers with a window
keep what it reaches, in the store's rows. A prompt in chunks is several prompts, as several turns are.

What differs from the engine: entries take the bytes that they have, without room for more, so a store has no context;
a prompt is attended to in the model's dtype, and rows are decoded for each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from barefoot.core.errors import Incompatible
from barefoot.drivers import attention
from barefoot.drivers.entries import Entries, PromptRows, StoredRows, entries_of
from barefoot.kv import budgets
from barefoot.kv.merging import Rows, merge
from barefoot.kv.policies import I32, Policy, Seen, by_layer
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore, SealingStore
from barefoot.plan.job import parse_kv

MANY = 1 << 30  # positions: there is no context


class KVCache(Cache):
    """The keys and values of a batch of sequences of one length; ``copy.deepcopy`` branches them.

    Parameters
    ----------
    model : a causal model of transformers. Its attention becomes sdpa, watched where a cache is one of these.
    kv : a store, or a policy and a store, as a spec string or as :func:`barefoot.plan.job.parse_kv` makes it.

    Raises
    ------
    InvalidInput : an unreadable composition.
    Incompatible : parts that don't go together, or a model with attention that can't be kept this way.
    """

    def __init__(self, model: Any, kv: str | KVStore) -> None:
        store = parse_kv(kv) if isinstance(kv, str) else kv
        policy, store = (store.policy, store.store) if isinstance(store, Ruled) else (None, store)
        config = model.config.get_text_config(decoder=True)
        _check(model, config, policy, store)
        layers: list[Any] = []  # of HeldLayer
        for number, layer in enumerate(DynamicCache(config=config).layers):
            if type(layer) is DynamicLayer:
                layers.append(RuledLayer(policy, store, sum(isinstance(other, RuledLayer) for other in layers)))
            elif type(layer) is DynamicSlidingWindowLayer:
                layers.append(WindowLayer(store, int(layer.sliding_window)))
            else:
                raise Incompatible(
                    f"layer {number} keeps no keys and values of positions: it is a {type(layer).__name__}"
                )
        super().__init__(layers=layers)
        ruled = [layer for layer in layers if isinstance(layer, RuledLayer)]
        for layer in ruled:
            layer.together = ruled
        self.reset()
        model.set_attn_implementation(attention.NAME)

    @property
    def bytes(self) -> int:
        """Of the storages of all tensors that are held."""
        held: list[Any] = self.layers
        parts = (part for layer in held if layer.entries for part in layer.entries.parts.values())
        storages = (part.untyped_storage() for part in parts)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def positions(self, layer: int) -> Tensor:
        """Of the entries of a layer, ascending, int32 (batch, n_kv_heads, n)."""
        held: Any = self.layers[layer]
        entries = held.entries
        return torch.empty((0, 0, 0), dtype=torch.int32) if entries is None else entries.position


def _check(model: Any, config: Any, policy: Policy | None, store: KVStore) -> None:
    """Refuse what attends in another way than ``attention`` does."""
    name = type(model).__name__
    if config.is_encoder_decoder or not getattr(model, "_supports_sdpa", False):
        raise Incompatible(f"{name} is no decoder whose attention can be sdpa")
    if getattr(config, "attn_logit_softcapping", None):
        raise Incompatible(f"{name} caps the scores of its attention, which sdpa can't")
    if getattr(config, "num_kv_shared_layers", 0):
        raise Incompatible(f"layers of {name} share their keys and values, so entries can't go layer by layer")
    if not (store.rows or isinstance(store, SealingStore)):
        raise Incompatible(f"{store} keeps entries that are no rows, which only the engine does")
    if store.sorts_keys:
        raise Incompatible(
            f"{store} puts channels in an order that the model's weights say, which only the engine does"
        )
    if policy is not None and policy.n_anchored:
        raise Incompatible(f"{policy} turns queries to its first entries, which only the engine does")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    store.bits_per_number(head_dim)  # whether it has such rows


class HeldLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of which only stored entries are there between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_tokens = 0
        self.entries: Entries | None = None

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Keys that ``query`` further tokens meet, and the position of the first if those before had no gaps.

        query : how many, or their positions.
        """
        n_held = 0 if self.entries is None else self.entries.n
        return n_held + (query if isinstance(query, int) else len(query)), self.n_tokens - n_held

    def reset(self) -> None:
        self.entries, self.n_tokens, self.is_initialized = None, 0, False

    def crop(self, n: int) -> NoReturn:
        """
        Raises
        ------
        Incompatible : always.
        """
        raise Incompatible("entries that have gone don't come back, so tokens can't be taken back either")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.entries is not None:
            self.entries.pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.entries is not None:
            self.entries.pick(torch.arange(len(self.entries.position)).repeat_interleave(repeats))

    def _with(self, entries: Entries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All that is held, and these behind it."""
        if not entries.n:
            return k, v
        keys, values = entries.dense(k.dtype)
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


class WindowLayer(HeldLayer):
    """Attention reaches ``window`` positions back, the query's own included, so one less is kept."""

    is_sliding = True

    def __init__(self, store: KVStore, window: int) -> None:
        super().__init__()
        self.sliding_window, self._format = window, store.row_format

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        entries = self.entries = self.entries or Entries(key_states, value_states, self._format, {})
        keys, values = self._with(entries, key_states, value_states)
        entries.append(key_states, value_states, self.n_tokens)
        if (n := entries.n) >= self.sliding_window:
            last = torch.arange(n - self.sliding_window + 1, n, device=key_states.device)
            entries.keep(last.expand(*key_states.shape[:2], -1))
        self.n_tokens, self.is_initialized = self.n_tokens + key_states.shape[2], True
        return keys, values


class RuledLayer(HeldLayer):
    """``policy`` chooses among entries of all positions; without one all stay. ``number`` counts such layers, and
    ``together`` are all of them, which share a budget."""

    def __init__(self, policy: Policy | None, store: KVStore, number: int) -> None:
        super().__init__()
        self.policy, self.store, self._stated, self._number = policy, store, policy, number
        self.together: list[RuledLayer] = []
        self._watched = "nothing" if policy is None else policy.observes
        self._n_parts = policy.n_parts if policy is not None and self._watched == "strikes" else 0

    def reset(self) -> None:
        super().reset()
        self._prompt: tuple[Tensor, Tensor] | None = None  # that passes
        self._awaits = False  # the attention of a pass
        self._n_prompt = 0  # tokens that there were when the last prompt was done
        self._parts = [0] * self._n_parts  # tokens that there were when each part of the strikes began
        self._part = 0  # the present one
        self._weight: float | None = None  # of this layer where all share their budget as measured
        self.policy = stated = self._stated
        if stated is not None and stated.layers == "pyramid":
            n = len(self.together)
            self.policy = by_layer(stated, budgets.pyramid(n), n, MANY)[self._number]

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """
        Raises
        ------
        Incompatible : the last pass's attention was not seen.
        """
        if self._awaits:
            raise Incompatible(
                f"the model's attention is not {attention.NAME!r}, which tells a cache what it may forget",
                cure=f"leave the model's attention as KVCache sets it: set_attn_implementation({attention.NAME!r})",
            )
        if self.entries is None:
            self.entries = entries_of(self.store, key_states, value_states, self._kept_of_each())
            if self.policy is not None and self.policy.n_carried:
                self.entries.parts["carried"] = torch.zeros((len(key_states), self.policy.n_carried))
        if self.n_tokens == 0 or key_states.shape[2] > 1:
            self._prompt = key_states, value_states
            keys, values = self._with(self.entries, key_states, value_states)
        else:
            self.entries.append(key_states, value_states, self.n_tokens)
            keys, values = self.entries.dense(key_states.dtype)
        self.n_tokens += key_states.shape[2]
        self.is_initialized = self._awaits = True
        attention.awaited[keys] = self
        return keys, values

    def _kept_of_each(self) -> dict[str, tuple[int, ...]]:
        """What entries have besides their rows and positions: further axes by name."""
        found: dict[str, tuple[int, ...]] = {}
        if self._watched == "mass":
            found["mass"] = ()
        if self._watched == "strikes":
            found["strikes"] = (self._n_parts,)
        if self.policy is not None and self.policy.biased:
            found["bias"] = ()
        return found

    def bias(self, n: int) -> Tensor | None:
        """What is added to the scores of n entries, (batch, n_kv_heads, n): those that are not stored yet have none."""
        bias = None if self.entries is None else self.entries.parts.get("bias")
        return None if bias is None else torch.nn.functional.pad(bias, (0, n - bias.shape[2]))

    def attended(self, query: Tensor, key: Tensor, scale: float) -> None:
        """The entries of the pass, these keys, have been attended to: what stays is settled."""
        entries = self.entries
        assert entries is not None
        self._awaits = False
        if self._prompt is not None:
            (k, v), self._prompt = self._prompt, None
            self._settle(entries, k, v, query, key, scale)
        else:
            self._step(entries, query, key, scale)
        entries.seal()

    # --- a prompt ---

    def _settle(self, entries: Entries, k: Tensor, v: Tensor, query: Tensor, key: Tensor, scale: float) -> None:
        """A prompt has passed: the policy chooses of it and of what was there."""
        policy, watched, n_old, q = self.policy, self._watched, entries.n, k.shape[2]
        self._n_prompt = self.n_tokens
        chooses = policy is not None and (n_old == 0 or entries.lets_go)  # what can't go makes no room for others
        n_seen = 0
        if policy is not None and chooses and watched != "nothing":
            n_seen = q if watched in ("mass", "sums") else min(q, policy.n_observed(n_old + q))
        bias, observed = self.bias(n_old + q), None
        if watched != "nothing":
            observed = attention.observe(watched, query[:, :, q - n_seen :], key, scale, bias)
        if policy is not None and policy.merges:
            k, v = k.detach().float().clone(), v.detach().float().clone()
        rows = [PromptRows(entries, i, k, v) for i in range(len(k))]
        entries.append(k, v, self.n_tokens - q, store=False)
        if watched == "mass" and observed is not None:
            observed = entries.parts["mass"] = observed + entries.parts["mass"]
        stay = None
        if chooses:
            if n_old == 0 and policy is not None and policy.layers == "measured":
                assert observed is not None
                self._share_budgets(observed)
            stay = self._chosen(entries, observed, rows)
        entries.store(k, v)
        if stay is not None:
            entries.keep(stay)
        if watched == "strikes" and observed is not None:
            strikes = torch.zeros_like(entries.parts["strikes"])
            if stay is None:
                strikes[..., 0] = observed
            entries.parts["strikes"] = strikes
            began = self.n_tokens - n_seen if stay is None else self.n_tokens
            self._parts, self._part = [began] * self._n_parts, 0

    def _share_budgets(self, observed: Tensor) -> None:
        """This layer of a first prompt shares the budget of all with those before it, of which some entries go.

        Raises
        ------
        Incompatible : several sequences, whose layers would have other budgets each.
        """
        if len(observed) > 1:
            raise Incompatible(f"{self._stated} measures a budget for each sequence, got a batch of {len(observed)}")
        assert self._stated is not None
        self._weight = budgets.density(_array(observed[0]))
        layers = self.together[: self._number + 1]
        weights = [layer._weight for layer in layers if layer._weight is not None]
        for layer, rule in zip(layers, by_layer(self._stated, weights, len(self.together), MANY), strict=True):
            layer.policy = rule
            if layer is not self and layer.entries is not None and layer.entries.n > rule.keep:
                rows = [StoredRows(layer.entries, 0)]
                stay = layer._chosen(layer.entries, layer.entries.parts["mass"], rows)
                if stay is not None:
                    layer.entries.keep(stay)

    def _chosen(self, entries: Entries, observed: Tensor | None, rows: Sequence[Rows]) -> Tensor | None:
        """Slots that stay, None for all; others have been merged into them."""
        policy, stay = self.policy, []
        assert policy is not None
        for i, own in enumerate(rows):
            seen = self._seen(entries, i, observed, own)
            kept = policy.choose(seen)
            if policy.merges and kept.shape[1] < seen.n:
                self._merge(entries, i, seen, kept, own)
            stay.append(kept)
        return None if stay[0].shape[1] == entries.n else _slots(np.stack(stay), entries.position.device)

    def _seen(self, entries: Entries, i: int, observed: Tensor | None, rows: Rows) -> Seen:
        """What a policy sees of a sequence."""
        bias, carried = entries.parts.get("bias"), entries.parts.get("carried")
        return Seen(
            position=_array(entries.position[i]),
            n_tokens=self.n_tokens,
            observed=None if observed is None else _array(observed[i]),
            layer=self._number,
            n_prompt=self._n_prompt,
            bias=None if bias is None else _array(bias[i]),
            carried=None if carried is None else _array(carried[i]),
            keys=rows.keys,
        )

    def _merge(self, entries: Entries, i: int, seen: Seen, stay: I32, rows: Rows) -> None:
        assert self.policy is not None
        found = merge(self.policy, seen, stay, rows)
        for name, made in (("carried", found.carried), ("bias", found.bias)):
            if made is not None and name in entries.parts:
                part = entries.parts[name].clone()
                part[i] = torch.from_numpy(made)
                entries.parts[name] = part

    # --- decoding ---

    def _step(self, entries: Entries, query: Tensor, key: Tensor, scale: float) -> None:
        """A token has passed: the policy may send entries away."""
        policy, n = self.policy, entries.n
        if policy is None:
            return
        observed = None
        if self._watched == "mass":
            mass = attention.observe("mass", query, key, scale, self.bias(n))
            observed = entries.parts["mass"] = entries.parts["mass"] + mass
        if self._watched == "strikes":
            strikes = entries.parts["strikes"] = entries.parts["strikes"].clone()
            strikes[..., self._part] += attention.observe("strikes", query, key, scale, self.bias(n))
            late = [part for part, began in enumerate(self._parts) if began >= self.n_tokens - policy.window]
            observed = strikes[..., late].sum(dim=-1)
        goes = policy.sends_away(n, self.n_tokens)
        if goes:
            entries.keep(self._left(policy, entries, observed))
        if self._n_parts and (goes or policy.begins_part(n)):
            self._part = (self._part + 1) % self._n_parts
            self._parts[self._part] = self.n_tokens
            strikes = entries.parts["strikes"] = entries.parts["strikes"].clone()
            strikes[..., self._part] = 0

    def _left(self, policy: Policy, entries: Entries, observed: Tensor | None) -> Tensor:
        """Slots that stay when others are sent away, which may have been merged into them."""
        stay = []
        for i in range(len(entries.position)):
            rows = StoredRows(entries, i)
            seen = self._seen(entries, i, observed, rows)
            there = np.ones(seen.position.shape, bool)
            np.put_along_axis(there, policy.evict(seen).astype(np.int64), False, axis=1)
            left = there.nonzero()[1].reshape(len(there), -1).astype(np.int32)
            if policy.merges_tokens:
                self._merge(entries, i, seen, left, rows)
            stay.append(left)
        return _slots(np.stack(stay), entries.position.device)


def _array(tensor: Tensor) -> Any:
    """A tensor as numpy's array, the same memory where that is the processor's."""
    return tensor.cpu().numpy()


def _slots(stay: I32 | np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(stay.astype(np.int64)).to(device)
