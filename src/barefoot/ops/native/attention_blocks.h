// Attention of one token over blocks (kvblocks.py): keys by channel, and values by token (attention_channels.h has those
// by channel). Either are matrices of terms,
// which have a scale and a minimum each, by lanes, and what is wanted of each lane is a sum over terms,
//
//   sum of x[t] * (scale[t] * code[t] + minimum[t]) = sum of (x[t] * scale[t]) * code[t] + sum of x[t] * minimum[t]
//
// where x are queries, and the lanes' sums are scores, or x are weights, and the sums are outputs. The first products
// are rounded to 16 bits, 32,767 levels to either side of zero, anew for each matrix and query; the second sum is the
// same for all lanes.
#pragma once

constexpr float kTermLevels = 32767;
constexpr int64_t kMostTerms = 256;  // 256 * 32767 * 255 < 2^31: sums of codes of 8 bits fit
constexpr int kLaneVectors = kLanes == 16 ? 2 : 1;  // registers of lanes that share what is loaded of a term

// --- products of terms and codes ---

// Products x * scale of each of n terms, a multiple of 32, in steps of `step`, two by two as the codes lie; `offset` is
// the sum of x * minimum. ranges(t) is where the scales of terms t .. t + 15 lie, minimums `apart` bytes behind.
template <int Queries, class Ranges>
inline void round_terms(const float* x, int64_t stride, int64_t n, Ranges ranges, int64_t apart, int16_t* to,
                        int64_t to_stride, float* step, float* offset) {
  I largest[Queries];
  F lows[Queries], inverse[Queries];
  for (int i = 0; i < Queries; ++i) largest[i] = zero_int(), lows[i] = set1(0.0f);
  for (int64_t t = 0; t < n; t += kLanes) {
    const uint8_t* const at = ranges(t);
    const F scale = load_half(at), low = load_half(at + apart);
    for (int i = 0; i < Queries; ++i) {
      const F each = load(x + i * stride + t);
      largest[i] = max(largest[i], magnitude_bits(each * scale));
      lows[i] = fma(each, low, lows[i]);
    }
  }
  for (int i = 0; i < Queries; ++i) {
    const float top = largest_magnitude(largest[i]);
    const bool used = top >= kSmallest && top <= 3.4028234663852886e38f;
    inverse[i] = set1(used ? kTermLevels / top : 0.0f);
    step[i] = (used ? top * (1.0f / kTermLevels) : 0.0f) + 0.0f * top;  // NaN where a product is NaN or infinity
    offset[i] = reduce_add(lows[i]);
  }
  // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
  const F shifter = set1(12582912.0f);
  for (int64_t t = 0; t < n; t += 32)
    for (int64_t d = 0; d < 16; d += kLanes) {
      const F first = load_half(ranges(t + d)), second = load_half(ranges(t + 16 + d));
      for (int i = 0; i < Queries; ++i) {
        const float* const each = x + i * stride + t + d;
        store_pairs(to + i * to_stride + t + 2 * d, fma(load(each) * first, inverse[i], shifter),
                    fma(load(each + 16) * second, inverse[i], shifter));
      }
    }
}

// Sums of the products of lanes' codes with the rounded terms, for kLaneVectors registers of lanes; even and odd terms
// have sums of their own, as each waits for the one before it.
template <int Queries>
struct CodeSums {
  I of[Queries][kLaneVectors][2];
  CodeSums() {
    for (auto& query : of)
      for (auto& lanes : query) lanes[0] = lanes[1] = zero_int();
  }
  F whole(int i, int v) const { return to_float(of[i][v][0] + of[i][v][1]); }
};

// 32 terms: `words` those of the first of these lanes, in chunks of 32 lanes.
template <int Bits, int Queries>
inline void add_terms(const uint8_t* words, const int16_t* terms, int64_t stride, CodeSums<Queries>& sum) {
  constexpr int kWidth = Bits == 3 ? 2 : Bits, kFields = 16 / kWidth;
  for (int c = 0; c < 16 / kFields; ++c) {
    Quads word[kLaneVectors], third[kLaneVectors];
    for (int v = 0; v < kLaneVectors; ++v) {
      word[v] = load_quads(words + 128 * c + 4 * kLanes * v);
      if constexpr (Bits == 3) {  // where bit 2 is the first of these fields'
        const Quads bits = load_quads(words + 256 + 4 * kLanes * v);
        third[v] = c == 0 ? shift_pairs<-2>(bits) : shift_pairs<6>(bits);
      }
    }
    BAREFOOT_UNROLL
    for (int k = 0; k < kFields; ++k) {
      for (int v = 0; v < kLaneVectors; ++v) {
        Quads code = k + 1 < kFields ? keep_pairs(word[v], (1 << kWidth) - 1) : word[v];
        word[v] = shift_pairs<kWidth>(word[v]);
        if constexpr (Bits == 3) {
          code = merge(code, keep_pairs(third[v], 4));
          third[v] = shift_pairs<1>(third[v]);
        }
        for (int i = 0; i < Queries; ++i) {
          const Quads pair = repeat_quad(reinterpret_cast<const int8_t*>(terms + i * stride + 2 * (c * kFields + k)));
          sum.of[i][v][k % 2] = dot_pairs(sum.of[i][v][k % 2], code, pair);
        }
      }
    }
  }
}

inline void ask_for(const uint8_t* from, const uint8_t* to) {
#if defined(__GNUC__)
  for (const uint8_t* p = from; p < to; p += 64) __builtin_prefetch(p);
#else
  (void)from, (void)to;
#endif
}

// --- keys ---

template <int Bits>
struct ChannelKeys final : KeyTiles {
  const KeyBlocks& blocks;
  const AttentionLayout& l;
  const AttentionScratch& s;
  const uint8_t* head;
  int64_t start, dim, base = 0, n = 0, prepared = -1;
  // Over the float transposed tile, of each query: 1, 1, [dim].
  float *step, *offset;
  int16_t* terms;

  ChannelKeys(const SegmentArgs& a, const AttentionLayout& layout, const AttentionScratch& scratch, int64_t h)
      : blocks(a.key_blocks), l(layout), s(scratch), start(a.key_start), dim(blocks.head_dim) {
    head = a.k + h * blocks.n_blocks * blocks.block_bytes();
    step = s.turned;
    offset = step + l.sharing;
    terms = reinterpret_cast<int16_t*>(offset + l.sharing);
  }

  const uint8_t* block(int64_t position) const { return head + position / blocks.group * blocks.block_bytes(); }
  const uint8_t* run(int64_t position) const {
    return block(position) + 4 * dim + position % blocks.group / kBlockRun * blocks.run_bytes();
  }

  void take(int64_t first, int64_t count) override {
    base = start + first, n = count;
    for (int64_t j = 0; j < n; j += kBlockRun) ask_for(run(base + j), run(base + j) + blocks.run_bytes());
    for (int64_t j = 0; j < n; j += blocks.group) ask_for(block(base + j), block(base + j) + 4 * dim);
  }

  void prepare(int64_t position) {
    if (position / blocks.group == prepared) return;
    prepared = position / blocks.group;
    const uint8_t* const scales = block(position);
    query_blocks(l.sharing, [&](auto queries, int64_t i) {
      round_terms<queries.value>(s.q + i * l.width, l.width, dim, [&](int64_t c) { return scales + 2 * c; }, 2 * dim,
                                 terms + i * dim, dim, step + i, offset + i);
    });
  }

  template <int Queries>
  void score_run(const uint8_t* words, int64_t i0, float* to) const {
    for (int64_t j = 0; j < kBlockRun; j += kLaneVectors * kLanes) {
      CodeSums<Queries> sum;
      for (int64_t c = 0; c < dim; c += 32)
        add_terms<Bits>(words + c / 32 * Bits * 128 + 4 * j, terms + i0 * dim + c, dim, sum);
      for (int i = 0; i < Queries; ++i)
        for (int v = 0; v < kLaneVectors; ++v)
          store(to + i * kKeyTile + j + v * kLanes, fma(sum.whole(i, v), set1(step[i0 + i]), set1(offset[i0 + i])));
    }
  }

  void score() override {
    for (int64_t j = 0; j < n; j += kBlockRun) {
      prepare(base + j);
      query_blocks(l.sharing, [&](auto queries, int64_t i) {
        this->template score_run<queries.value>(run(base + j), i, s.score + i * kKeyTile + j);
      });
    }
  }
};

inline bool is_direct(const KeyBlocks& k, int64_t sharing) {
  return k.head_dim % 32 == 0 && k.head_dim <= kMostTerms && sharing <= kMostPackedQueries;
}

// --- values ---

template <int Bits>
struct TokenValues final : ValueTiles {
  const ValueBlocks& blocks;
  const AttentionLayout& l;
  const AttentionScratch& s;
  const uint8_t *head, *tile = nullptr;
  int64_t start, n = 0;

  TokenValues(const SegmentArgs& a, const AttentionLayout& layout, const AttentionScratch& scratch, int64_t h)
      : blocks(a.value_blocks), l(layout), s(scratch), start(a.value_start) {
    head = a.v + h * blocks.n_blocks * blocks.block_bytes();
  }

  void take(int64_t first, int64_t count) override {
    n = count;
    tile = head + (start + first) / kBlockRun * blocks.block_bytes();
    ask_for(tile, tile + (n + kBlockRun - 1) / kBlockRun * blocks.block_bytes());
  }

  // 32 channels from c on; ranges: of each 32 positions.
  template <int Queries>
  void mix_part(const uint8_t* const* ranges, int64_t i0, int64_t c) const {
    int16_t terms[Queries][kKeyTile];
    float step[Queries], offset[Queries];
    round_terms<Queries>(s.score + i0 * kKeyTile, kKeyTile, round_up(n, kBlockRun),
                         [&](int64_t j) { return ranges[j / kBlockRun] + 2 * (j % kBlockRun); }, 2 * kBlockRun,
                         terms[0], kKeyTile, step, offset);
    const uint8_t* const words = tile + c / 32 * blocks.part_bytes(32) + 4 * kBlockRun;
    for (int64_t d = 0; d < 32; d += kLaneVectors * kLanes) {
      CodeSums<Queries> sum;
      for (int64_t j = 0; j < n; j += kBlockRun)
        add_terms<Bits>(words + j / kBlockRun * blocks.block_bytes() + 4 * d, terms[0] + j, kKeyTile, sum);
      for (int i = 0; i < Queries; ++i)
        for (int v = 0; v < kLaneVectors; ++v) {
          float* const to = s.sum + (i0 + i) * l.width + c + d + v * kLanes;
          store(to, load(to) + fma(sum.whole(i, v), set1(step[i]), set1(offset[i])));
        }
    }
  }

  void mix() override {
    for (int64_t c = 0; c < blocks.head_dim; c += 32) {
      const uint8_t* ranges[kKeyTile / kBlockRun];
      uint8_t last[4 * kBlockRun] = {};  // without what no entry has: it may be NaN
      for (int64_t j = 0; j < n; j += kBlockRun) {
        const uint8_t* at = tile + j / kBlockRun * blocks.block_bytes() + c / 32 * blocks.part_bytes(32);
        if (n - j < kBlockRun) {
          std::memcpy(last, at, 2 * (n - j));
          std::memcpy(last + 2 * kBlockRun, at + 2 * kBlockRun, 2 * (n - j));
          at = last;
        }
        ranges[j / kBlockRun] = at;
      }
      query_blocks(l.sharing, [&](auto queries, int64_t i) { this->template mix_part<queries.value>(ranges, i, c); });
    }
  }
};

inline bool is_direct(const ValueBlocks& v, int64_t sharing) {
  return v.head_dim % 32 == 0 && sharing <= kMostPackedQueries;
}

// body(Constant<bits>)
template <class Body>
inline void with_bits(int bits, Body body) {
  switch (bits) {
    case 2: return body(Constant<2>{});
    case 3: return body(Constant<3>{});
    case 4: return body(Constant<4>{});
    default: return body(Constant<8>{});
  }
}

// --- float32 copies ---

// Codes of up to 32 terms in each of up to 32 lanes: body(term, code), where code(lane) is a number.
template <class Body>
inline void each_term(int bits, const uint8_t* run, int64_t n_terms, int64_t n_lanes, Body body) {
  struct Field {
    const uint8_t* at;  // in the word of the first lane
    int shift, mask;
    int of(int64_t lane) const { return read<uint16_t>(at + 4 * lane) >> shift & mask; }
  };
  const auto field = [&](const uint8_t* part, int width, int64_t t) {
    const int64_t each = 16 / width, half = (n_terms + 2 * each - 1) / (2 * each) * each, i = t % half;
    return Field{part + 4 * (i / each * n_lanes) + 2 * (t / half), static_cast<int>(i % each) * width, (1 << width) - 1};
  };
  const uint8_t* const thirds = run + 4 * n_lanes * code_words(2, n_terms);
  for (int64_t t = 0; t < n_terms; ++t) {
    const Field low = field(run, bits == 3 ? 2 : bits, t), high = bits == 3 ? field(thirds, 1, t) : Field{run, 0, 0};
    body(t, [&](int64_t lane) { return static_cast<float>(low.of(lane) | high.of(lane) << 2); });
  }
}

// Up to 32 lanes of a matrix: out[t * stride + lane].
inline void decode_run(int bits, const uint8_t* ranges, const uint8_t* run, int64_t n_terms, int64_t n_lanes,
                       float* out, int64_t stride) {
  for (int64_t from = 0; from < n_terms; from += 32) {
    const int64_t n = n_terms - from < 32 ? n_terms - from : 32;
    each_term(bits, run, n, n_lanes, [&](int64_t t, auto code) {
      const float scale = half_at(ranges + 2 * (from + t)), minimum = half_at(ranges + 2 * (n_terms + from + t));
      float* const to = out + (from + t) * stride;
      for (int64_t lane = 0; lane < n_lanes; ++lane) to[lane] = scale * code(lane) + minimum;
    });
    run += 4 * n_lanes * code_words(bits, n);
  }
}

// 32 positions as channels of positions: out[c * kKeyTile + j].
inline void decode_keys(const KeyBlocks& k, const uint8_t* head, int64_t position, float* out) {
  const uint8_t* const block = head + position / k.group * k.block_bytes();
  const uint8_t* const run = block + 4 * k.head_dim + position % k.group / kBlockRun * k.run_bytes();
  decode_run(k.bits, block, run, k.head_dim, kBlockRun, out, kKeyTile);
}

// 32 positions: out[j * width + c].
inline void decode_values(const ValueBlocks& v, const uint8_t* head, int64_t position, float* out, int64_t width) {
  const uint8_t* part = head + position / kBlockRun * v.block_bytes();
  for (int64_t c = 0; c < v.head_dim; c += 32) {
    const int64_t n = v.head_dim - c < 32 ? v.head_dim - c : 32;
    decode_run(v.bits, part, part + 4 * kBlockRun, kBlockRun, n, out + c, width);
    part += v.part_bytes(n);
  }
}
