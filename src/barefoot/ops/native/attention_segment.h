// Attention over one segment of a KV store: its entries are added to the running softmax of a state that goes from
// segment to segment, so that all of them together are one softmax. Keys and values lie in rows or in blocks; entries may
// carry a bias (of several tokens in one entry), and factors of keys and values (a direction that layers share). Scores
// can be kept, for those who ask how much each entry was attended to.
#pragma once

// Queries [0, n) of a task: of which token and head, and how many entries it sees.
struct SegmentTask {
  int64_t head, token, n_tokens;
  int64_t n_queries(const AttentionLayout& l) const { return n_tokens * l.sharing; }
};
inline int64_t n_seen(const SegmentArgs& a, int64_t head, int64_t token) {
  const int64_t n = a.counts[head], reach = a.n_before + token + 1;
  return a.n_before < 0 || n < reach ? n : reach;
}

inline AttentionLayout lay_out(const SegmentArgs& a) {
  AttentionLayout l{};
  l.sharing = a.n_heads / a.n_kv_heads();
  const int64_t tokens = kQueryTile / l.sharing > 1 ? kQueryTile / l.sharing : 1;
  l.tile_tokens = tokens < a.n_tokens ? tokens : a.n_tokens;
  const int64_t dim = a.key_dim() > a.value_dim() ? a.key_dim() : a.value_dim();
  l.width = round_up(dim, 16);
  const int64_t queries = l.tile_tokens * l.sharing;
  const int64_t floats = 2 * queries * l.width + 2 * kKeyTile * l.width + queries * kKeyTile + 2 * queries;
  l.thread_floats = round_up(4 * floats, kAlign) / 4;
  const int64_t partial = a.n_tokens == 1 ? round_up(4 * a.n_heads * kMaxSplits * (l.width + 2), kAlign) : 0;
  l.bytes = kAlign + 4 * a.n_threads * l.thread_floats + partial;
  l.base = reinterpret_cast<float*>(a.scratch + (kAlign - reinterpret_cast<uintptr_t>(a.scratch) % kAlign) % kAlign);
  l.partial = l.base + a.n_threads * l.thread_floats;
  return l;
}

inline int64_t segment_scratch(const SegmentArgs& a) { return lay_out(a).bytes; }

inline void start_queries(const SegmentArgs& a, const AttentionLayout& l, const AttentionScratch& s,
                          const SegmentTask& task) {
  const int64_t dim = a.key_dim();
  for (int64_t i = 0; i < task.n_queries(l); ++i) {
    const int64_t token = task.token + i / l.sharing, head = task.head * l.sharing + i % l.sharing;
    const float* q = a.q + (token * a.n_heads + head) * dim;
    for (int64_t d = 0; d < l.width; ++d) s.q[i * l.width + d] = d < dim ? q[d] * a.scale : 0.0f;
    for (int64_t d = 0; d < l.width; ++d) s.sum[i * l.width + d] = 0.0f;
    s.top[i] = -INFINITY;
    s.total[i] = 0.0f;
  }
}

// Scores of entries [base, base + n) become the weights of their values.
inline void weigh(const SegmentArgs& a, const AttentionLayout& l, const AttentionScratch& s, const SegmentTask& task,
                  int64_t base, int64_t n) {
  const int64_t at = task.head * a.stride + base;
  for (int64_t i = 0; i < task.n_queries(l); ++i) {
    float* const score = s.score + i * kKeyTile;
    const int64_t token = task.token + i / l.sharing, end = n_seen(a, task.head, token) - base;
    const int64_t seen = end < 0 ? 0 : end < n ? end : n;
    if (a.key_scale)
      for (int64_t j = 0; j < seen; ++j) score[j] *= a.key_scale[at + j];
    if (a.softcap > 0.0f) {
      const F cap = set1(a.softcap), inverse = set1(1.0f / a.softcap);
      map(score, score, score, seen, [&](F x, F) { return cap * tanh(x * inverse); });
    }
    if (a.bias)
      for (int64_t j = 0; j < seen; ++j) score[j] += a.bias[at + j];
    if (a.scores) {
      const int64_t query_head = task.head * l.sharing + i % l.sharing;
      float* const kept = a.scores + (query_head * a.n_tokens + token) * a.stride + base;
      for (int64_t j = 0; j < seen; ++j) kept[j] = score[j];
      for (int64_t j = seen; j < n; ++j) kept[j] = -INFINITY;
    }
    soften(score, 0, seen, kKeyTile, 0.0f, s.top + i, s.total + i, s.sum + i * l.width, l.width);
    if (a.value_scale)
      for (int64_t j = 0; j < seen; ++j) score[j] *= a.value_scale[at + j];
  }
}

// Any number of queries and any formats, by float32 copies of the tiles.
inline void attend_floats(const SegmentArgs& a, const AttentionLayout& l, const AttentionScratch& s,
                          const SegmentTask& task, int64_t first, int64_t last) {
  const int64_t width = l.width, dim = a.key_dim(), n_queries = task.n_queries(l);
  start_queries(a, l, s, task);
  const auto decode_tile = [&](const RowSource& from, int64_t base, int64_t n) {
    const TileRows rows = from.tile(base, n);
    for (int64_t j = 0; j < n; ++j) decode_kv_row(from.kv, rows.at[j], s.tile + j * width, width);
  };
  for (int64_t base = first; base < last; base += kKeyTile) {
    const int64_t n = last - base < kKeyTile ? last - base : kKeyTile, columns = round_up(n, kLanes);
    if (a.keys_in_blocks) {
      const uint8_t* const keys = a.k + task.head * a.key_blocks.n_blocks * a.key_blocks.block_bytes();
      for (int64_t j = 0; j < n; j += kBlockRun) decode_keys(a.key_blocks, keys, a.key_start + base + j, s.turned + j);
    } else {
      decode_tile({a.key_rows, a.k, task.head, a.key_start}, base, n);
      for (int64_t j = 0; j < n; j += kLanes)
        for (int64_t d = 0; d < width; d += kLanes)
          transpose_block(s.tile + j * width + d, width, s.turned + d * kKeyTile + j, kKeyTile);
    }
    multiply({s.q, width, s.turned, kKeyTile, dim, s.score, kKeyTile, false}, n_queries, columns);
    weigh(a, l, s, task, base, n);
    if (a.values_in_blocks) {
      const uint8_t* const values = a.v + task.head * a.value_blocks.n_blocks * a.value_blocks.block_bytes();
      const auto decode = a.value_blocks.by_channel ? decode_channel_values : decode_values;
      for (int64_t j = 0; j < n; j += kBlockRun)
        decode(a.value_blocks, values, a.value_start + base + j, s.tile + j * width, width);
    } else {
      decode_tile({a.value_rows, a.v, task.head, a.value_start}, base, n);
    }
    multiply({s.score, kKeyTile, s.tile, width, n, s.sum, width, true}, n_queries, width);
  }
}

// The queries of one token, straight from the store where its formats allow it.
inline void attend_one(const SegmentArgs& a, const AttentionLayout& l, const AttentionScratch& s, int64_t head,
                       int64_t first, int64_t last) {
  const SegmentTask task{head, 0, 1};
  const bool keys_direct = a.keys_in_blocks ? is_direct(a.key_blocks, l.sharing) : is_direct(a.key_rows, l.sharing);
  const bool values_direct = a.values_in_blocks ? is_direct(a.value_blocks, l.sharing) : is_direct(a.value_rows, l.sharing);
  if (!keys_direct || !values_direct) return attend_floats(a, l, s, task, first, last);
  start_queries(a, l, s, task);
  const auto attend = [&](KeyTiles& keys, ValueTiles& values) {
    attend_entries(keys, values, first, last, [&](int64_t base, int64_t n) { weigh(a, l, s, task, base, n); });
  };
  const auto with_keys = [&](KeyTiles& keys) {
    if (!a.values_in_blocks)
      return with_row_values({a.value_rows, a.v, head, a.value_start}, l, s,
                             [&](ValueTiles& values) { attend(keys, values); });
    with_bits(a.value_blocks.bits, [&](auto bits) {
      if (a.value_blocks.by_channel) {
        ChannelValues<bits.value> values(a, l, s, head);
        return attend(keys, values);
      }
      TokenValues<bits.value> values(a, l, s, head);
      attend(keys, values);
    });
  };
  if (!a.keys_in_blocks) return with_row_keys({a.key_rows, a.k, head, a.key_start}, l, s, with_keys);
  with_bits(a.key_blocks.bits, [&](auto bits) {
    ChannelKeys<bits.value> keys(a, l, s, head);
    with_keys(keys);
  });
}

// What one query found joins what the segments before found.
inline void join(const float* sum, float top, float total, int64_t dim, float* to_sum, float* to_top, float* to_total) {
  if (top == -INFINITY && total == 0.0f) return;  // it saw nothing
  const float highest = top > *to_top || top != top ? top : *to_top;
  const float keep = *to_top == -INFINITY ? 0.0f : std::exp(*to_top - highest), take = std::exp(top - highest);
  for (int64_t d = 0; d < dim; ++d) to_sum[d] = (keep == 0.0f ? 0.0f : to_sum[d] * keep) + sum[d] * take;
  *to_total = *to_total * keep + total * take;
  *to_top = highest;
}

inline void join_task(const SegmentArgs& a, const AttentionLayout& l, const AttentionScratch& s,
                      const SegmentTask& task) {
  const int64_t dim = a.value_dim();
  for (int64_t i = 0; i < task.n_queries(l); ++i) {
    const int64_t at = (task.token + i / l.sharing) * a.n_heads + task.head * l.sharing + i % l.sharing;
    join(s.sum + i * l.width, s.top[i], s.total[i], dim, a.sums + at * dim, a.tops + at, a.totals + at);
  }
}

// Scores of the entries from `last` on, which no token of the task sees.
inline void hide_rest(const SegmentArgs& a, const AttentionLayout& l, const SegmentTask& task, int64_t last) {
  if (!a.scores) return;
  for (int64_t i = 0; i < task.n_queries(l); ++i) {
    const int64_t query_head = task.head * l.sharing + i % l.sharing, token = task.token + i / l.sharing;
    float* const kept = a.scores + (query_head * a.n_tokens + token) * a.stride;
    for (int64_t j = last; j < a.counts[task.head]; ++j) kept[j] = -INFINITY;
  }
}

// One token: a task is a key head and a range of entries, and the ranges join in order, as in attend_splits.
inline void attend_segment_splits(const SegmentArgs& a, const AttentionLayout& l) {
  const int64_t stride = l.width + 2, n_kv_heads = a.n_kv_heads();
  int64_t most = 0, n_entries = 0;
  for (int64_t head = 0; head < n_kv_heads; ++head) {
    const int64_t n = n_seen(a, head, 0);
    n_entries += n;
    if (n > 0 && split_keys(n - 1, 0).n_splits > most) most = split_keys(n - 1, 0).n_splits;
  }
  const int threads = n_entries * l.sharing * l.width < kParallel ? 1 : a.n_threads;
  parallel_for(n_kv_heads * most, threads, [&](int64_t task, int thread) {
    const int64_t head = task / most, split = task % most, n = n_seen(a, head, 0);
    const SplitKeys keys = split_keys(n - 1, 0);
    if (n == 0 || split >= keys.n_splits) return;
    const int64_t begin = split * keys.range, end = begin + keys.range;
    const AttentionScratch s = scratch_of(l, thread);
    attend_one(a, l, s, head, begin, end < n ? end : n);
    for (int64_t i = 0; i < l.sharing; ++i) {
      float* const part = l.partial + ((head * l.sharing + i) * kMaxSplits + split) * stride;
      std::memcpy(part, s.sum + i * l.width, l.width * sizeof(float));
      part[l.width] = s.top[i];
      part[l.width + 1] = s.total[i];
    }
  });
  for (int64_t head = 0; head < n_kv_heads; ++head) hide_rest(a, l, {head, 0, 1}, n_seen(a, head, 0));
  for (int64_t h = 0; h < a.n_heads; ++h) {
    const int64_t n = n_seen(a, h / l.sharing, 0), n_splits = n > 0 ? split_keys(n - 1, 0).n_splits : 0;
    for (int64_t split = 0; split < n_splits; ++split) {
      const float* const part = l.partial + (h * kMaxSplits + split) * stride;
      const int64_t dim = a.value_dim();
      join(part, part[l.width], part[l.width + 1], dim, a.sums + h * dim, a.tops + h, a.totals + h);
    }
  }
}

inline void attend_segment(const SegmentArgs& a) {
  const AttentionLayout l = lay_out(a);
  if (a.n_tokens == 1) return attend_segment_splits(a, l);
  const int64_t n_tiles = (a.n_tokens + l.tile_tokens - 1) / l.tile_tokens;
  parallel_for(n_tiles * a.n_kv_heads(), a.n_threads, [&](int64_t task, int thread) {
    const int64_t tile = n_tiles - 1 - task / a.n_kv_heads(), first = tile * l.tile_tokens;
    const int64_t rest = a.n_tokens - first, n = rest < l.tile_tokens ? rest : l.tile_tokens;
    const SegmentTask each{task % a.n_kv_heads(), first, n};
    const AttentionScratch s = scratch_of(l, thread);
    const int64_t last = n_seen(a, each.head, first + n - 1);
    attend_floats(a, l, s, each, 0, last);
    join_task(a, l, s, each);
    hide_rest(a, l, each, last);
  });
}

constexpr int64_t kMassTile = 512;  // entries of a task: their shares stay in the first cache

inline void attention_mass(const MassArgs& a) {
  const int64_t sharing = a.n_heads / a.n_kv_heads, n_tiles = (a.stride + kMassTile - 1) / kMassTile;
  const int threads = a.n_tokens * a.n_heads * a.stride < kParallel ? 1 : a.n_threads;
  parallel_for(a.n_kv_heads * n_tiles, threads, [&](int64_t task, int) {
    const int64_t head = task / n_tiles, first = task % n_tiles * kMassTile, rest = a.counts[head] - first;
    const int64_t n = rest < kMassTile ? rest : kMassTile;
    if (n <= 0) return;
    float* const mass = a.mass + head * a.mass_stride + first;
    float share[kMassTile], highest[kMassTile];
    for (int64_t token = 0; token < a.n_tokens; ++token) {
      if (!a.thresholds) {
        for (int64_t h = head * sharing; h < (head + 1) * sharing; ++h) {
          const float* const score = a.scores + (h * a.n_tokens + token) * a.stride + first;
          const F part = set1(1.0f / a.totals[token * a.n_heads + h]), top = set1(a.tops[token * a.n_heads + h]);
          map(score, mass, mass, n, [&](F x, F sum) { return fma(exp(x - top), part, sum); });
        }
        continue;
      }
      for (int64_t j = 0; j < n; ++j) highest[j] = 0.0f;
      for (int64_t h = head * sharing; h < (head + 1) * sharing; ++h) {
        const float* const score = a.scores + (h * a.n_tokens + token) * a.stride + first;
        const float part = 1.0f / a.totals[token * a.n_heads + h];
        const F top = set1(a.tops[token * a.n_heads + h]);
        map(score, score, share, n, [&](F x, F) { return exp(x - top); });
        for (int64_t j = 0; j < n; ++j) highest[j] = share[j] * part > highest[j] ? share[j] * part : highest[j];
      }
      for (int64_t j = 0; j < n; ++j) mass[j] += highest[j] < a.thresholds[token] ? 1.0f : 0.0f;
    }
  });
}
