// Causal attention within documents that lie one behind the other, forward and backward, as flash.py describes it:
// float32 throughout, and no array of all queries by all keys.
#pragma once

struct FlashTile {  // rows [first, last) of the document [begin, end), whose tiles of queries begin with this number
  int64_t begin, end, first, last, queries;
};

struct FlashLayout {
  int64_t sharing;      // query heads per key head
  int64_t tile_tokens;  // of a tile of queries
  int64_t width;        // head_dim rounded up to whole vectors
  int64_t n_rows;       // of all documents
  int64_t n_query_tiles, n_key_tiles;
  int64_t thread_floats, bytes;
  FlashTile* tiles;
  float* delta;  // backward: [n_heads, n_rows], of each query the sum of d_out * out
  Turn* turns;   // backward: [n_query_tiles, n_kv_heads]
  float* base;
};

inline int64_t n_flash_tiles(const FlashArgs& a, int64_t size) {
  int64_t n = 0;
  for (int64_t i = 0; i < a.n_documents; ++i) n += (a.lengths[i] + size - 1) / size;
  return n;
}

inline FlashLayout lay_out(const FlashArgs& a, bool backward) {
  FlashLayout l{};
  l.sharing = a.n_heads / a.n_kv_heads;
  l.tile_tokens = kQueryTile / l.sharing > 1 ? kQueryTile / l.sharing : 1;
  l.width = round_up(a.head_dim, 16);
  l.n_rows = n_flash_tiles(a, 1);
  l.n_query_tiles = n_flash_tiles(a, l.tile_tokens);
  l.n_key_tiles = n_flash_tiles(a, kKeyTile);
  const int64_t queries = l.tile_tokens * l.sharing;
  const int64_t wide = backward ? 3 * queries + 5 * kKeyTile : 2 * queries + 2 * kKeyTile;
  l.thread_floats = round_up(4 * (wide * l.width + (backward ? 2 : 1) * queries * kKeyTile + 2 * queries), kAlign) / 4;
  const int64_t n_tiles = backward ? l.n_key_tiles : l.n_query_tiles;
  const int64_t tiles = round_up(static_cast<int64_t>(sizeof(FlashTile)) * n_tiles, kAlign);
  const int64_t delta = backward ? round_up(4 * a.n_heads * l.n_rows, kAlign) : 0;
  const int64_t turns = backward ? round_up(4 * l.n_query_tiles * a.n_kv_heads, kAlign) : 0;
  l.bytes = kAlign + tiles + delta + turns + 4 * a.n_threads * l.thread_floats;
  uint8_t* const base = a.scratch + (kAlign - reinterpret_cast<uintptr_t>(a.scratch) % kAlign) % kAlign;
  l.tiles = reinterpret_cast<FlashTile*>(base);
  l.delta = reinterpret_cast<float*>(base + tiles);
  l.turns = reinterpret_cast<Turn*>(base + tiles + delta);
  l.base = reinterpret_cast<float*>(base + tiles + delta + turns);
  return l;
}

inline int64_t flash_scratch(const FlashArgs& a, bool backward) { return lay_out(a, backward).bytes; }

// The tiles of `size` tokens of all documents.
inline void cut(const FlashArgs& a, const FlashLayout& l, int64_t size) {
  int64_t begin = 0, queries = 0;
  FlashTile* tile = l.tiles;
  for (int64_t i = 0; i < a.n_documents; ++i) {
    const int64_t end = begin + a.lengths[i];
    for (int64_t first = begin; first < end; first += size)
      *tile++ = {begin, end, first, first + size < end ? first + size : end, queries};
    queries += (a.lengths[i] + l.tile_tokens - 1) / l.tile_tokens;
    begin = end;
  }
}

// The rows of `each` heads from `head` on, of n tokens from `first` on, in an array [tokens, n_heads, dim].
struct HeadRows {
  int64_t n_heads, dim, head, each, first, n;
  int64_t size() const { return n * each; }
  int64_t token(int64_t i) const { return first + i / each; }
  int64_t head_of(int64_t i) const { return head + i % each; }
  int64_t at(int64_t i) const { return (token(i) * n_heads + head_of(i)) * dim; }
};
inline HeadRows query_rows(const FlashArgs& a, const FlashLayout& l, int64_t head, int64_t first, int64_t n) {
  return {a.n_heads, a.head_dim, head * l.sharing, l.sharing, first, n};
}
inline HeadRows key_rows(const FlashArgs& a, int64_t head, int64_t first, int64_t n) {
  return {a.n_kv_heads, a.head_dim, head, 1, first, n};
}

// Copies times a factor, side by side and padded with zeros.
inline void pack(const float* x, const HeadRows& rows, float factor, float* to, int64_t width) {
  const F times = set1(factor);
  for (int64_t i = 0; i < rows.size(); ++i, to += width) {
    const float* const from = x + rows.at(i);
    int64_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) store(to + d, load(from + d) * times);
    if (d < rows.dim) store(to + d, load_first(from + d, rows.dim - d) * times), d += kLanes;
    for (; d < width; d += kLanes) store(to + d, set1(0.0f));
  }
}

// Packed rows of a tile of keys to columns: to[d][j] = from[j][d].
inline void to_columns(const float* from, int64_t n, int64_t width, float* to) {
  for (int64_t j = 0; j < n; j += kLanes)
    for (int64_t d = 0; d < width; d += kLanes)
      transpose_block(from + j * width + d, width, to + d * kKeyTile + j, kKeyTile);
}

inline void clear(float* to, int64_t n) { std::memset(to, 0, n * sizeof(float)); }

// Of the n keys from `base` on, the ones [first, last) that a token sees.
struct SeenKeys {
  int64_t first, last;
};
inline SeenKeys seen_keys(const FlashArgs& a, int64_t token, int64_t base, int64_t n) {
  const int64_t oldest = a.window > 0 ? token - a.window + 1 - base : 0, end = token + 1 - base;
  return {oldest < 0 ? 0 : oldest < n ? oldest : n, end < 0 ? 0 : end < n ? end : n};
}

inline void flash_tile(const FlashArgs& a, const FlashLayout& l, const FlashTile& tile, int64_t head, float* scratch,
                       float* out, float* lse) {
  const int64_t width = l.width, queries = l.tile_tokens * l.sharing;
  float* const q = scratch;
  float* const sum = q + queries * width;
  float* const rows = sum + queries * width;
  float* const turned = rows + kKeyTile * width;
  float* const score = turned + kKeyTile * width;
  float* const top = score + queries * kKeyTile;
  float* const total = top + queries;
  const HeadRows own = query_rows(a, l, head, tile.first, tile.last - tile.first);
  pack(a.q, own, 1.0f, q, width);
  clear(sum, own.size() * width);
  clear(total, own.size());
  for (int64_t i = 0; i < own.size(); ++i) top[i] = -INFINITY;
  const int64_t oldest = a.window > 0 ? tile.first - a.window + 1 : 0;
  for (int64_t base = oldest > tile.begin ? oldest : tile.begin; base < tile.last; base += kKeyTile) {
    const int64_t n = tile.last - base < kKeyTile ? tile.last - base : kKeyTile;
    const HeadRows keys = key_rows(a, head, base, n);
    pack(a.k, keys, a.scale, rows, width);  // as the backward pass does: its scores are the same numbers
    to_columns(rows, n, width, turned);
    multiply({q, width, turned, kKeyTile, a.head_dim, score, kKeyTile, false}, own.size(), round_up(n, kLanes));
    for (int64_t i = 0; i < own.size(); ++i) {
      const SeenKeys seen = seen_keys(a, own.token(i), base, n);
      soften(score + i * kKeyTile, seen.first, seen.last, n, a.softcap, top + i, total + i, sum + i * width, width);
    }
    pack(a.v, keys, 1.0f, rows, width);
    multiply({score, kKeyTile, rows, width, n, sum, width, true}, own.size(), width);
  }
  for (int64_t i = 0; i < own.size(); ++i) {
    write_output(sum + i * width, total[i], a.head_dim, out + own.at(i));
    lse[own.head_of(i) * a.n + own.token(i)] = top[i] + std::log(total[i]);
  }
}

inline void flash_forward(const FlashArgs& a, float* out, float* lse) {
  const FlashLayout l = lay_out(a, false);
  cut(a, l, l.tile_tokens);
  parallel_for(l.n_query_tiles * a.n_kv_heads, a.n_threads, [&](int64_t task, int thread) {
    const FlashTile& tile = l.tiles[l.n_query_tiles - 1 - task / a.n_kv_heads];  // of a document the longest first
    flash_tile(a, l, tile, task % a.n_kv_heads, l.base + thread * l.thread_floats, out, lse);
  });
  clear(out + l.n_rows * a.n_heads * a.head_dim, (a.n - l.n_rows) * a.n_heads * a.head_dim);
  for (int64_t head = 0; head < a.n_heads; ++head)
    for (int64_t i = l.n_rows; i < a.n; ++i) lse[head * a.n + i] = -INFINITY;
}

// Of one query: scores become probabilities, and the gradients of probabilities those of scores, over `columns` keys of
// which it sees some.
inline void differentiate(const SeenKeys& seen, int64_t columns, float softcap, float lse, float delta, float* score,
                          float* gradient) {
  const F norm = set1(lse), mean = set1(delta);
  for (int64_t j = 0; j < columns; j += kLanes) {
    F s = load(score + j), slope = set1(1.0f);
    if (softcap > 0.0f) {
      const F part = tanh(s * set1(1.0f / softcap));
      s = set1(softcap) * part;
      slope = slope - part * part;
    }
    const F weight = exp_falling(s - norm);
    store(score + j, weight);
    store(gradient + j, weight * (load(gradient + j) - mean) * slope);
  }
  for (int64_t j = 0; j < seen.first; ++j) score[j] = gradient[j] = 0.0f;
  for (int64_t j = seen.last; j < columns; ++j) score[j] = gradient[j] = 0.0f;
}

inline void flash_key_tile(const FlashArgs& a, const FlashLayout& l, const FlashTile& tile, int64_t head,
                           float* scratch, const FlashGradients& g) {
  const int64_t width = l.width, queries = l.tile_tokens * l.sharing, n = tile.last - tile.first;
  float* const q = scratch;
  float* const d_out = q + queries * width;
  float* const dq = d_out + queries * width;
  float* const rows = dq + queries * width;
  float* const turned_keys = rows + kKeyTile * width;
  float* const turned_values = turned_keys + kKeyTile * width;
  float* const dk = turned_values + kKeyTile * width;
  float* const dv = dk + kKeyTile * width;
  float* const score = dv + kKeyTile * width;
  float* const d_score = score + queries * kKeyTile;
  const HeadRows keys = key_rows(a, head, tile.first, n);
  pack(a.v, keys, 1.0f, rows, width);
  to_columns(rows, n, width, turned_values);
  pack(a.k, keys, a.scale, rows, width);
  to_columns(rows, n, width, turned_keys);
  clear(dk, n * width);
  clear(dv, n * width);
  const int64_t reach = tile.last - 1 + a.window, last = a.window > 0 && reach < tile.end ? reach : tile.end;
  for (int64_t at = (tile.first - tile.begin) / l.tile_tokens; tile.begin + at * l.tile_tokens < last; ++at) {
    const int64_t first = tile.begin + at * l.tile_tokens, end = first + l.tile_tokens < last ? first + l.tile_tokens : last;
    const int64_t from = first > tile.first ? first : tile.first;  // those before see none of these keys
    const HeadRows own = query_rows(a, l, head, from, end - from);
    const int64_t columns = round_up(n, kLanes);
    pack(a.q, own, 1.0f, q, width);
    pack(g.d_out, own, 1.0f, d_out, width);
    multiply({q, width, turned_keys, kKeyTile, a.head_dim, score, kKeyTile, false}, own.size(), columns);
    multiply({d_out, width, turned_values, kKeyTile, a.head_dim, d_score, kKeyTile, false}, own.size(), columns);
    for (int64_t i = 0; i < own.size(); ++i) {
      const int64_t of = own.head_of(i), token = own.token(i);
      differentiate(seen_keys(a, token, tile.first, n), columns, a.softcap, g.lse[of * a.n + token],
                    l.delta[of * l.n_rows + token], score + i * kKeyTile, d_score + i * kKeyTile);
    }
    multiply({score, 1, d_out, width, own.size(), dv, width, true, kKeyTile}, n, width);
    multiply({d_score, 1, q, width, own.size(), dk, width, true, kKeyTile}, n, width);
    multiply({d_score, kKeyTile, rows, width, n, dq, width, false}, own.size(), width);
    const int64_t oldest = a.window > 0 && first - a.window + 1 > tile.begin ? first - a.window + 1 : tile.begin;
    Turn& turn = l.turns[(tile.queries + at) * a.n_kv_heads + head];
    turn.wait(static_cast<int32_t>((tile.first - tile.begin) / kKeyTile - (oldest - tile.begin) / kKeyTile));
    for (int64_t i = 0; i < own.size(); ++i) {
      float* const to = g.dq + own.at(i);
      map(to, dq + i * width, to, a.head_dim, [](F x, F y) { return x + y; });
    }
    turn.pass();
  }
  for (int64_t j = 0; j < n; ++j) {
    const F scale = set1(a.scale);
    map(dk + j * width, dk + j * width, g.dk + keys.at(j), a.head_dim, [&](F x, F) { return x * scale; });
    std::memcpy(g.dv + keys.at(j), dv + j * width, a.head_dim * sizeof(float));
  }
}

inline void flash_backward(const FlashArgs& a, const FlashGradients& g) {
  const FlashLayout l = lay_out(a, true);
  const int64_t dim = a.head_dim, kv_floats = a.n_kv_heads * dim;
  cut(a, l, kKeyTile);
  for (int64_t i = 0; i < l.n_query_tiles * a.n_kv_heads; ++i) new (l.turns + i) Turn;
  clear(g.dq, a.n * a.n_heads * dim);
  clear(g.dk + l.n_rows * kv_floats, (a.n - l.n_rows) * kv_floats);
  clear(g.dv + l.n_rows * kv_floats, (a.n - l.n_rows) * kv_floats);
  parallel_for(l.n_rows, l.n_rows * a.n_heads * dim < kParallel ? 1 : a.n_threads, [&](int64_t token, int) {
    for (int64_t head = 0; head < a.n_heads; ++head) {
      const int64_t row = (token * a.n_heads + head) * dim;
      F sum = set1(0.0f);
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) sum = fma(load(g.d_out + row + d), load(g.out + row + d), sum);
      if (d < dim) sum = fma(load_first(g.d_out + row + d, dim - d), load_first(g.out + row + d, dim - d), sum);
      l.delta[head * l.n_rows + token] = reduce_add(sum);
    }
  });
  parallel_in_order(l.n_key_tiles * a.n_kv_heads, a.n_threads, [&](int64_t task, int thread) {
    flash_key_tile(a, l, l.tiles[task / a.n_kv_heads], task % a.n_kv_heads, l.base + thread * l.thread_floats, g);
  });
}
