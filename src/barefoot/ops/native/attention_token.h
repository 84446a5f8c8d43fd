// Attention of one token, straight from the KV rows. Its queries are few, so float32 copies of the tiles would cost more
// than the products themselves; every key and value is read once for up to four queries.
//
// f16 and f32 rows are widened in registers, for up to four queries a key head; with more, a transposed copy pays.
// q8, q4, q3 and q2 rows are multiplied as integers, where head_dim is whole groups: queries are rounded to 16 bits per group
// of 32 (32,384 levels to either side of zero, as two signed bytes), and so are, per tile and group of values, the
// probabilities times the values' scales (32,767 levels).
#pragma once

constexpr int kTokenQueries = 4;            // that share a load
constexpr int kHighPlane = 254;             // code = 254 * high + low, both in -127..127
constexpr float kQueryLevels = 127 * 254 + 126;  // one more would round high to 128
constexpr float kWeightLevels = 32767;
constexpr int64_t kMostPackedQueries = 32;  // whose codes fit beside a tile's in the scratch

// Call body with Constant<1 .. kTokenQueries> and the first query of each block.
template <class Body>
inline void query_blocks(int64_t n_queries, Body body) {
  static_assert(kTokenQueries == 4);
  int64_t i = 0;
  for (; i + 4 <= n_queries; i += 4) body(Constant<4>{}, i);
  switch (n_queries - i) {
    case 3: return body(Constant<3>{}, i);
    case 2: return body(Constant<2>{}, i);
    case 1: return body(Constant<1>{}, i);
  }
}

// --- rows of floats ---

template <class Row, int Queries>
inline void dot_float_rows(const TileRows& keys, const float* q, int64_t dim, int64_t width, float* score) {
  for (int64_t j = 0; j < keys.n; ++j) {
    F sum[Queries];
    for (int i = 0; i < Queries; ++i) sum[i] = set1(0.0f);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const F key = Row::part(keys.at[j], d);
      for (int i = 0; i < Queries; ++i) sum[i] = fma(load(q + i * width + d), key, sum[i]);
    }
    for (int i = 0; i < Queries; ++i) score[i * kKeyTile + j] = reduce_add(sum[i]);
  }
}

template <class Row, int Queries, int Vectors>
inline void mix_float_rows(const TileRows& values, const float* score, int64_t d, int64_t width, float* out) {
  F sum[Queries][Vectors];
  for (int i = 0; i < Queries; ++i)
    for (int v = 0; v < Vectors; ++v) sum[i][v] = load(out + i * width + d + v * kLanes);
  for (int64_t j = 0; j < values.n; ++j) {
    F part[Vectors];
    for (int v = 0; v < Vectors; ++v) part[v] = Row::part(values.at[j], d + v * kLanes);
    for (int i = 0; i < Queries; ++i) {
      const F weight = set1(score[i * kKeyTile + j]);
      for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(weight, part[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Queries; ++i)
    for (int v = 0; v < Vectors; ++v) store(out + i * width + d + v * kLanes, sum[i][v]);
}

template <class Row>
struct FloatKeys {
  const AttentionLayout& l;
  const AttentionScratch& s;
  int64_t dim;

  void score(const TileRows& keys) const {
    query_blocks(l.sharing, [&](auto queries, int64_t i) {
      dot_float_rows<Row, queries.value>(keys, s.q + i * l.width, dim, l.width, s.score + i * kKeyTile);
    });
  }
};

template <class Row>
struct FloatValues {
  const AttentionLayout& l;
  const AttentionScratch& s;
  int64_t dim;

  void mix(const TileRows& values) const {
    query_blocks(l.sharing, [&](auto queries, int64_t i) {
      const float* const score = s.score + i * kKeyTile;
      float* const out = s.sum + i * l.width;
      int64_t d = 0;
      for (; d + kMixVectors * kLanes <= dim; d += kMixVectors * kLanes)
        mix_float_rows<Row, queries.value, kMixVectors>(values, score, d, l.width, out);
      for (; d < dim; d += kLanes) mix_float_rows<Row, queries.value, 1>(values, score, d, l.width, out);
    });
  }
};

// --- rows of codes ---

struct Row8 {
  static constexpr int bytes = 2 + kGroup;
  static constexpr bool wide = !kUnsignedBytes, has_low = false;
  static constexpr int zero = kUnsignedBytes ? 128 : 0;
  static Codes key(const uint8_t* group) { return plain_bytes(group + 2, zero); }
  static Codes value(const uint8_t* group) { return plain_bytes(group + 2, 0); }
};
template <int Bits>
struct AffineRow {
  static constexpr int bytes = 4 + kGroup * Bits / 8;
  static constexpr bool wide = false, has_low = true;
  static constexpr int zero = 0;
  static Codes key(const uint8_t* group) { return unpack_group<Bits>(group + 4); }
  static Codes value(const uint8_t* group) { return unpack_group<Bits>(group + 4); }
};

// One group of a query: q = scale * (254 * high + low).
struct QueryGroup {
  float scale, sum;         // sum: of q as rounded
  int32_t high_start, low_start;  // what the zero point of the keys' codes takes off
};

inline void round_query(const float* q, int zero, int8_t* high, int8_t* low, QueryGroup* group) {
  float largest = 0.0f, total = 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const float magnitude = std::fabs(q[i]);
    largest = magnitude > largest ? magnitude : largest;
    total += magnitude;
  }
  const bool used = largest >= kSmallest && total <= 3.4028234663852886e38f;
  const float inverse = used ? kQueryLevels / largest : 0.0f;
  int32_t sum_high = 0, sum_low = 0;
  for (int i = 0; i < kGroup; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
    const float shifted = (used ? q[i] : 0.0f) * inverse + 12582912.0f;
    const float shifted_high = (shifted - 12582912.0f) * (1.0f / kHighPlane) + 12582912.0f;
    int32_t whole, part;
    std::memcpy(&whole, &shifted, 4);
    std::memcpy(&part, &shifted_high, 4);
    part -= 0x4b400000;
    const int32_t rest = whole - 0x4b400000 - kHighPlane * part;
    high[i] = static_cast<int8_t>(part);
    low[i] = static_cast<int8_t>(rest);
    sum_high += part;
    sum_low += rest;
  }
  group->scale = largest / kQueryLevels + 0.0f * total;  // NaN where the group holds NaN or infinity
  if (!used && group->scale == group->scale) group->scale = 0.0f;
  group->sum = group->scale * static_cast<float>(kHighPlane * sum_high + sum_low);
  group->high_start = -zero * sum_high;
  group->low_start = -zero * sum_low;
}

// What keys and values of codes share: scales and minima of a tile's rows, over the float tile behind room for the
// codes of keys, [kKeyTile][dim].
template <class Row>
struct PackedRows {
  const AttentionLayout& l;
  const AttentionScratch& s;
  int64_t dim, n_groups;
  uint8_t* codes;
  float *scale, *low;  // [n_groups][kKeyTile]

  PackedRows(const AttentionLayout& layout, const AttentionScratch& scratch, int64_t head_dim)
      : l(layout), s(scratch), dim(head_dim), n_groups(head_dim / kGroup) {
    codes = reinterpret_cast<uint8_t*>(s.tile);
    scale = s.tile + kKeyTile * dim / 4;
    low = scale + n_groups * kKeyTile;
  }

  // Scales (and minima) of all rows, 0 behind the last one; what else is done with each group is up to body.
  template <class Body>
  void take_groups(const TileRows& rows, Body body) const {
    const auto halves = [](float* at) { return reinterpret_cast<uint8_t*>(at) + 2 * kKeyTile; };
    for (int64_t j = 0; j < rows.n; ++j) {
      const uint8_t* group = rows.at[j];
      for (int64_t g = 0; g < n_groups; ++g, group += Row::bytes) {
        std::memcpy(halves(scale + g * kKeyTile) + 2 * j, group, 2);
        if constexpr (Row::has_low) std::memcpy(halves(low + g * kKeyTile) + 2 * j, group + 2, 2);
        body(group);
      }
    }
    // Each row of halves stands in the upper part of the floats that it becomes, so reads stay ahead of writes.
    const auto widen = [&](float* to) {
      std::memset(halves(to) + 2 * rows.n, 0, 2 * (kKeyTile - rows.n));
      for (int64_t j = 0; j < kKeyTile; j += kLanes) store(to + j, load_half(halves(to) + 2 * j));
    };
    for (int64_t g = 0; g < n_groups; ++g) {
      widen(scale + g * kKeyTile);
      if constexpr (Row::has_low) widen(low + g * kKeyTile);
    }
  }
};

template <class Row>
struct PackedKeys : PackedRows<Row> {
  using Rows = PackedRows<Row>;
  using Rows::l, Rows::s, Rows::dim, Rows::n_groups, Rows::codes, Rows::scale, Rows::low;
  // Over the float transposed tile: four codes of each key [dim / 4, whole vectors][kKeyTile], then the queries,
  // [sharing] each.
  uint8_t* quads;
  int8_t *q_high, *q_low;   // [dim]
  QueryGroup* q_group;      // [n_groups]

  PackedKeys(const AttentionLayout& layout, const AttentionScratch& scratch, int64_t head_dim)
      : Rows(layout, scratch, head_dim) {
    quads = reinterpret_cast<uint8_t*>(s.turned);
    q_group = reinterpret_cast<QueryGroup*>(s.turned + kKeyTile * round_up(dim / 4, kLanes));
    q_high = reinterpret_cast<int8_t*>(q_group + l.sharing * n_groups);
    q_low = q_high + l.sharing * dim;
    for (int64_t i = 0; i < l.sharing; ++i)
      for (int64_t g = 0; g < n_groups; ++g) {
        const int64_t at = i * dim + g * kGroup;
        round_query(s.q + i * l.width + g * kGroup, Row::zero, q_high + at, q_low + at, q_group + i * n_groups + g);
      }
  }

  template <int Queries>
  void score_block(int64_t i0, int64_t j) const {
    F score[Queries];
    for (int i = 0; i < Queries; ++i) score[i] = set1(0.0f);
    for (int64_t g = 0; g < n_groups; ++g) {
      const QueryGroup* const group = q_group + i0 * n_groups + g;
      I high[Queries], rest[Queries];
      for (int i = 0; i < Queries; ++i) {
        high[i] = set_int(group[i * n_groups].high_start);
        rest[i] = set_int(group[i * n_groups].low_start);
      }
      for (int64_t c = g * kGroup; c < (g + 1) * kGroup; c += 4) {
        const Quads key = load_quads(quads + c * kKeyTile + 4 * j);
        for (int i = 0; i < Queries; ++i) {
          high[i] = dot_quads<Row::wide>(high[i], key, repeat_quad(q_high + (i0 + i) * dim + c));
          rest[i] = dot_quads<Row::wide>(rest[i], key, repeat_quad(q_low + (i0 + i) * dim + c));
        }
      }
      const F key_scale = load(scale + g * kKeyTile + j);
      for (int i = 0; i < Queries; ++i) {
        const F whole = fma(to_float(high[i]), set1(static_cast<float>(kHighPlane)), to_float(rest[i]));
        score[i] = fma(whole * set1(group[i * n_groups].scale), key_scale, score[i]);
        if constexpr (Row::has_low)
          score[i] = fma(load(low + g * kKeyTile + j), set1(group[i * n_groups].sum), score[i]);
      }
    }
    for (int i = 0; i < Queries; ++i) store(s.score + (i0 + i) * kKeyTile + j, score[i]);
  }

  void score(const TileRows& keys) const {
    uint8_t* to = codes;
    this->take_groups(keys, [&](const uint8_t* group) {
      store(to, Row::key(group));
      to += kGroup;
    });
    // Four codes move as one float, untouched.
    const float* const rows = s.tile;
    for (int64_t j = 0; j < keys.n; j += kLanes) {
      for (int64_t c = 0; c < dim / 4; c += kLanes)
        transpose_block(rows + j * dim / 4 + c, dim / 4, s.turned + c * kKeyTile + j, kKeyTile);
      query_blocks(l.sharing, [&](auto queries, int64_t i) { this->template score_block<queries.value>(i, j); });
    }
  }

};

template <class Row>
struct PackedValues : PackedRows<Row> {
  using Rows = PackedRows<Row>;
  using Rows::l, Rows::s, Rows::n_groups, Rows::scale, Rows::low, Rows::Rows;

  // weight[j] = score[j] * scale[j] in steps of the returned size, which is NaN if any of them is.
  static float round_weights(const float* score, const float* scale, int16_t* weight) {
    float product[kKeyTile];
    F top = set1(0.0f), sum = set1(0.0f);
    for (int64_t j = 0; j < kKeyTile; j += kLanes) {
      const F each = load(score + j) * load(scale + j);  // not negative
      store(product + j, each);
      top = max(each, top);
      sum = sum + each;
    }
    const float largest = reduce_max(top);
    const bool used = largest >= kSmallest;
    const float inverse = used ? kWeightLevels / largest : 0.0f;
    for (int64_t j = 0; j < kKeyTile; ++j) {
      const float shifted = product[j] * inverse + 12582912.0f;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      weight[j] = static_cast<int16_t>(bits);  // the low half of a rounded number below 2^15
    }
    return (used ? largest / kWeightLevels : 0.0f) + 0.0f * reduce_add(sum);
  }

  template <int Queries>
  void mix_block(const TileRows& values, int64_t i0, int64_t g) const {
    int16_t weight[Queries][kKeyTile];
    float step[Queries], offset[Queries];
    Sums32 sum[Queries];
    for (int i = 0; i < Queries; ++i) {
      const float* const score = s.score + (i0 + i) * kKeyTile;
      step[i] = round_weights(score, scale + g * kKeyTile, weight[i]);
      offset[i] = 0.0f;
      if constexpr (Row::has_low) {
        F lows = set1(0.0f);
        for (int64_t j = 0; j < kKeyTile; j += kLanes) lows = fma(load(score + j), load(low + g * kKeyTile + j), lows);
        offset[i] = reduce_add(lows);
      }
      sum[i] = zero_sums();
    }
    for (int64_t j = 0; j < values.n; j += 2) {
      const Woven rows = weave(Row::value(values.at[j] + g * Row::bytes), Row::value(values.at[j + 1] + g * Row::bytes));
      for (int i = 0; i < Queries; ++i) add_rows(sum[i], rows, weight[i] + j);
    }
    for (int i = 0; i < Queries; ++i)
      add_scaled(s.sum + (i0 + i) * l.width + g * kGroup, sum[i], step[i], offset[i]);
  }

  void mix(const TileRows& values) const {
    this->take_groups(values, [](const uint8_t*) {});
    for (int64_t g = 0; g < n_groups; ++g)
      query_blocks(l.sharing, [&](auto queries, int64_t i) { this->template mix_block<queries.value>(values, i, g); });
  }
};

// --- all keys of a range ---

// The scores of one token's queries, and what it mixes with them: take() finds entries [base, base + n) and asks memory
// for them, score() and mix() work on those.
struct KeyTiles {
  virtual void take(int64_t base, int64_t n) = 0;
  virtual void score() = 0;

 protected:
  ~KeyTiles() = default;
};
struct ValueTiles {
  virtual void take(int64_t base, int64_t n) = 0;
  virtual void mix() = 0;

 protected:
  ~ValueTiles() = default;
};

// Entry e of one head lies in slot (start + e) % capacity.
struct RowSource {
  const KvShape& kv;
  const uint8_t* data;
  int64_t head, start;
  TileRows tile(int64_t base, int64_t n) const { return tile_rows(kv, data, head, start + base, n); }
};

template <class Kernel>
struct RowKeys final : KeyTiles {
  RowSource source;
  Kernel kernel;
  TileRows rows;
  RowKeys(const RowSource& from, const AttentionLayout& l, const AttentionScratch& s)
      : source(from), kernel{l, s, from.kv.head_dim} {}
  void take(int64_t base, int64_t n) override { rows = source.tile(base, n); }
  void score() override { kernel.score(rows); }
};
template <class Kernel>
struct RowValues final : ValueTiles {
  RowSource source;
  Kernel kernel;
  TileRows rows;
  RowValues(const RowSource& from, const AttentionLayout& l, const AttentionScratch& s)
      : source(from), kernel{l, s, from.kv.head_dim} {}
  void take(int64_t base, int64_t n) override { rows = source.tile(base, n); }
  void mix() override { kernel.mix(rows); }
};

// Entries [first, last): weigh(base, n) turns a tile's scores into weights.
template <class Weigh>
inline void attend_entries(KeyTiles& keys, ValueTiles& values, int64_t first, int64_t last, Weigh weigh) {
  const auto size = [&](int64_t base) { return last - base < kKeyTile ? last - base : kKeyTile; };
  keys.take(first, size(first));
  for (int64_t base = first; base < last; base += kKeyTile) {
    values.take(base, size(base));
    keys.score();
    weigh(base, size(base));
    if (base + kKeyTile < last) keys.take(base + kKeyTile, size(base + kKeyTile));
    values.mix();
  }
}

// Whether rows of that shape are multiplied as they are stored, for `sharing` queries.
inline bool is_direct(const KvShape& kv, int64_t sharing) {
  if (kv.format == KvFormat::f32 || kv.format == KvFormat::f16)
    return kv.head_dim % kLanes == 0 && sharing <= kTokenQueries;
  return kv.format != KvFormat::bfp4 && kv.head_dim % kGroup == 0 && sharing <= kMostPackedQueries;
}

// body(KeyTiles&) with the kernel of the rows' format, which is_direct. Queries are as start_queries left them.
template <class Body>
inline void with_row_keys(const RowSource& from, const AttentionLayout& l, const AttentionScratch& s, Body body) {
  const auto call = [&](auto keys) { body(keys); };
  switch (from.kv.format) {
    case KvFormat::f32: return call(RowKeys<FloatKeys<FloatRow>>(from, l, s));
    case KvFormat::f16: return call(RowKeys<FloatKeys<HalfRow>>(from, l, s));
    case KvFormat::q8: return call(RowKeys<PackedKeys<Row8>>(from, l, s));
    case KvFormat::q4: return call(RowKeys<PackedKeys<AffineRow<4>>>(from, l, s));
    case KvFormat::q3: return call(RowKeys<PackedKeys<AffineRow<3>>>(from, l, s));
    default: return call(RowKeys<PackedKeys<AffineRow<2>>>(from, l, s));
  }
}
template <class Body>
inline void with_row_values(const RowSource& from, const AttentionLayout& l, const AttentionScratch& s, Body body) {
  const auto call = [&](auto values) { body(values); };
  switch (from.kv.format) {
    case KvFormat::f32: return call(RowValues<FloatValues<FloatRow>>(from, l, s));
    case KvFormat::f16: return call(RowValues<FloatValues<HalfRow>>(from, l, s));
    case KvFormat::q8: return call(RowValues<PackedValues<Row8>>(from, l, s));
    case KvFormat::q4: return call(RowValues<PackedValues<AffineRow<4>>>(from, l, s));
    case KvFormat::q3: return call(RowValues<PackedValues<AffineRow<3>>>(from, l, s));
    default: return call(RowValues<PackedValues<AffineRow<2>>>(from, l, s));
  }
}

// The queries of one token that share key head `head`, over positions [first, last), all of which it sees.
inline void attend_one(const AttentionArgs& a, const AttentionLayout& l, const AttentionScratch& s, int64_t head,
                       int64_t first, int64_t last) {
  if (!is_direct(a.kv, l.sharing)) return attend(a, l, s, head, 0, 1, first, last);
  start_queries(a, l, s, head, 0, l.sharing);
  const auto soften_tile = [&](int64_t, int64_t n) {
    for (int64_t i = 0; i < l.sharing; ++i)
      soften(s.score + i * kKeyTile, 0, n, kKeyTile, a.softcap, s.top + i, s.total + i, s.sum + i * l.width, l.width);
  };
  with_row_keys({a.kv, a.k, head, 0}, l, s, [&](KeyTiles& keys) {
    with_row_values({a.kv, a.v, head, 0}, l, s,
                    [&](ValueTiles& values) { attend_entries(keys, values, first, last, soften_tile); });
  });
}

// The keys that one token sees, and the ranges that they are split into.
struct SplitKeys {
  int64_t first, last, range, n_splits;
};
inline SplitKeys split_keys(int64_t position, int64_t window) {
  const int64_t last = position + 1, oldest = last - window, first = window > 0 && oldest > 0 ? oldest : 0;
  const int64_t fair = round_up((last - first + kMaxSplits - 1) / kMaxSplits, kKeyTile);
  const int64_t range = fair > 4 * kKeyTile ? fair : 4 * kKeyTile;
  return {first, last, range, (last - first + range - 1) / range};
}

// The arguments of one token by itself.
inline AttentionArgs alone(const AttentionArgs& a, int64_t token) {
  AttentionArgs one = a;
  if (!a.spots) return one;
  const Spot& spot = a.spots[token];
  one.q += token * a.n_heads * a.kv.head_dim;
  one.k += spot.sequence * a.kv.bytes();
  one.v += spot.sequence * a.kv.bytes();
  one.n_past = spot.position;
  return one;
}

// Single tokens, each of its own sequence: a task is a token, a key head and a range of keys; the ranges are then put
// together in order. How the keys are split depends on their number only, so a token's result is the same for any
// number of threads, and whatever other tokens are there.
inline void attend_splits(const AttentionArgs& a, const AttentionLayout& l) {
  const int64_t stride = l.width + 2, dim = a.kv.head_dim;
  int64_t most = 0, n_keys = 0;
  for (int64_t token = 0; token < a.n_tokens; ++token) {
    const SplitKeys keys = split_keys(alone(a, token).n_past, a.window);
    most = keys.n_splits > most ? keys.n_splits : most;
    n_keys += keys.last - keys.first;
  }
  const int threads = n_keys * a.n_heads * dim < kParallel ? 1 : a.n_threads;
  parallel_for(a.n_tokens * a.kv.n_kv_heads * most, threads, [&](int64_t task, int thread) {
    const int64_t split = task % most, head = task / most % a.kv.n_kv_heads, token = task / most / a.kv.n_kv_heads;
    const AttentionArgs one = alone(a, token);
    const SplitKeys keys = split_keys(one.n_past, a.window);
    if (split >= keys.n_splits) return;
    const int64_t begin = keys.first + split * keys.range, end = begin + keys.range;
    const AttentionScratch s = scratch_of(l, thread);
    attend_one(one, l, s, head, begin, end < keys.last ? end : keys.last);
    for (int64_t i = 0; i < l.sharing; ++i) {
      float* part = l.partial + ((token * a.n_heads + head * l.sharing + i) * kMaxSplits + split) * stride;
      std::memcpy(part, s.sum + i * l.width, l.width * sizeof(float));
      part[l.width] = s.top[i];
      part[l.width + 1] = s.total[i];
    }
  });
  for (int64_t h = 0; h < a.n_tokens * a.n_heads; ++h) {
    float* into = l.partial + h * kMaxSplits * stride;
    const int64_t n_splits = split_keys(alone(a, h / a.n_heads).n_past, a.window).n_splits;
    for (int64_t split = 1; split < n_splits; ++split) {
      const float* part = into + split * stride;
      const float top = part[l.width] > into[l.width] ? part[l.width] : into[l.width];
      const float keep = std::exp(into[l.width] - top), take = std::exp(part[l.width] - top);
      for (int64_t d = 0; d < dim; ++d) into[d] = into[d] * keep + part[d] * take;
      into[l.width + 1] = into[l.width + 1] * keep + part[l.width + 1] * take;
      into[l.width] = top;
    }
    write_output(into, into[l.width + 1], dim, a.out + h * dim);
  }
}

inline void attention(const AttentionArgs& a) {
  const AttentionLayout l = lay_out(a);
  if (a.n_tokens == 1 || a.spots) return attend_splits(a, l);
#if defined(BAREFOOT_AMX)
  if (a.int8) return attend_tiles_bfloat16(a, l);
#endif
  attend_tiles(a, l);
}
