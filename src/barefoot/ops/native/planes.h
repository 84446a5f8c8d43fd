// Products of bit planes by XOR and population count; planes.py describes the layout bit by bit and the arithmetic.
//
// Lane r of a vector belongs to row r of a tile, and its 32 bits to 32 columns of one plane. So nothing is summed across
// lanes, and scales apply to groups of any multiple of 32 columns. All pairs of planes of a tile are counted and joined
// in registers: the only integers that reach memory are the planes of the activations.
#pragma once

constexpr int64_t kStepWords = 16;  // words counted before planes are joined; the planes of a step stay in the L1 cache

struct PlaneInput {  // [n_tokens, ...]
  uint32_t* words;   // [activation_bits, columns / 32]
  float* scale;      // per group: half of the value of plane 0, the other factor being the step of a weight
  float* sum;        // per group, of the activations
};

// --- vectors of words ---
//
//   Words    kLanes words of 32 bits               Counts   kLanes counters, or one for each byte of a word
//   count(c, w, x)   c + bits that differ in w and x; a step of 16 words fits a byte: 16 * 8 = 128

#if defined(__AVX512BW__)
struct Words {
  __m512i v;
};
struct Counts {
  __m512i v;
};
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Words load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words repeat_word(uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
inline Counts zero_counts() { return {_mm512_setzero_si512()}; }
#if defined(__AVX512VPOPCNTDQ__)
inline Counts count(Counts c, Words w, Words x) {
  return {_mm512_add_epi32(c.v, _mm512_popcnt_epi32(_mm512_xor_si512(w.v, x.v)))};
}
inline I total(Counts c) { return {c.v}; }
#else
inline Counts count(Counts c, Words w, Words x) {
  const __m512i ones = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i half = _mm512_set1_epi8(15), bits = _mm512_xor_si512(w.v, x.v);
  const __m512i low = _mm512_shuffle_epi8(ones, _mm512_and_si512(bits, half));
  const __m512i high = _mm512_shuffle_epi8(ones, _mm512_and_si512(_mm512_srli_epi16(bits, 4), half));
  return {_mm512_add_epi8(c.v, _mm512_add_epi8(low, high))};
}
inline I total(Counts c) {
  const __m512i pairs = _mm512_maddubs_epi16(c.v, _mm512_set1_epi8(1));
  return {_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))};
}
#endif

#elif defined(__AVX2__)
struct Words {
  __m256i v;
};
struct Counts {
  __m256i v;
};
inline I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Words load_words(const uint8_t* p) { return {load_256(p)}; }
inline Words repeat_word(uint32_t word) { return {_mm256_set1_epi32(static_cast<int>(word))}; }
inline Counts zero_counts() { return {_mm256_setzero_si256()}; }
inline Counts count(Counts c, Words w, Words x) {
  const __m256i ones =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i half = _mm256_set1_epi8(15), bits = _mm256_xor_si256(w.v, x.v);
  const __m256i low = _mm256_shuffle_epi8(ones, _mm256_and_si256(bits, half));
  const __m256i high = _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(bits, 4), half));
  return {_mm256_add_epi8(c.v, _mm256_add_epi8(low, high))};
}
inline I total(Counts c) {
  const __m256i pairs = _mm256_maddubs_epi16(c.v, _mm256_set1_epi8(1));
  return {_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))};
}

#else
struct Words {
  uint64_t v[kLanes / 2];
};
struct Counts {
  uint64_t v[kLanes / 2];
};
inline I operator-(I a, I b) {
  for (int i = 0; i < kLanes; ++i)
    a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]));
  return a;
}
inline Words load_words(const uint8_t* p) {
  Words r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Words repeat_word(uint32_t word) {
  Words r;
  for (uint64_t& two : r.v) two = static_cast<uint64_t>(word) << 32 | word;
  return r;
}
inline Counts zero_counts() { return Counts{}; }
inline Counts count(Counts c, Words w, Words x) {
  for (int i = 0; i < kLanes / 2; ++i) {
#if defined(__ARM_NEON) && defined(__aarch64__)
    c.v[i] += vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(w.v[i] ^ x.v[i]))), 0);
#else
    uint64_t bits = w.v[i] ^ x.v[i];  // neighbouring fields of 1, 2 and 4 bits are added up to bytes
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    c.v[i] += (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
#endif
  }
  return c;
}
inline I total(Counts c) {
  uint32_t bytes[kLanes];
  std::memcpy(bytes, c.v, sizeof bytes);
  I r;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t pairs = (bytes[i] & 0x00ff00ffu) + (bytes[i] >> 8 & 0x00ff00ffu);
    r.v[i] = static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16));
  }
  return r;
}
#endif

#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr int kCounters = 16;  // of 32 registers
#else
constexpr int kCounters = 8;
#endif

// --- activations ---

// n values at x, which share a scale, as planes of 32 columns each; a plane begins `stride` words after the one before.
inline void split_group(const float* x, int64_t n, int bits, uint32_t* words, int64_t stride, float* scale,
                        float* sum) {
  float largest = 0.0f, sums[8] = {};
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(x[i]);
    finite = finite && magnitude <= 3.4028234663852886e38f;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool used = finite && largest >= kSmallest;
  const float levels = static_cast<float>((1 << bits) - 1), half = static_cast<float>(1 << (bits - 1));
  const float inverse = used ? 0.5f * levels / largest : 0.0f;
  for (int64_t k = 0; k < n; k += 32, ++words) {
    uint8_t code[32] = {};  // columns after the last have the bits of padding in the weights
    const int columns = static_cast<int>(n - k < 32 ? n - k : 32);
    for (int i = 0; i < columns; ++i) {
      const float value = used ? x[k + i] : 0.0f;
      sums[i % 8] += value;
      code[i] = static_cast<uint8_t>(static_cast<int32_t>(value * inverse + half));  // positive: truncation is floor
    }
    for (int plane = 0; plane < bits; ++plane) {
      uint32_t word = 0;
      for (int part = 0; part < 4; ++part) {
        uint64_t eight;
        std::memcpy(&eight, code + 8 * part, 8);
        eight = (eight >> plane & 0x0101010101010101u) * 0x0102040810204080u >> 56;  // bit 0 of byte i to bit i
        word |= static_cast<uint32_t>(eight) << (8 * part);
      }
      words[plane * stride] = word;
    }
  }
  float total = 0.0f;
  for (const float part : sums) total += part;
  *scale = finite ? (used ? 0.5f * (largest / levels) : 0.0f) : NAN;
  *sum = finite ? total : NAN;
}

// --- the product ---

inline int64_t plane_words(int64_t n_cols) { return (n_cols + 31) / 32; }
inline int64_t plane_groups(const PlaneArgs& p) { return (p.n_cols + p.group - 1) / p.group; }
inline int64_t plane_tile_bytes(const PlaneArgs& p) {
  const int64_t header = 2 * kPlaneRows * (p.has_minimum ? 2 : 1);
  return plane_groups(p) * header + plane_words(p.n_cols) * p.weight_bits * 4 * kPlaneRows;
}

inline int64_t plane_tiles(const PlaneArgs& p) { return (p.n_rows + kPlaneRows - 1) / kPlaneRows; }
inline int64_t plane_bytes(const PlaneArgs& p) { return plane_tiles(p) * plane_tile_bytes(p); }

// Rows row0 .. row0 + kLanes - 1 of a tile times `Tokens` tokens.
template <int Bits, int Tokens>
void multiply_planes(const PlaneArgs& p, const PlaneInput& x, const uint8_t* tile, int row0, int64_t token, F* out) {
  constexpr int64_t vector_bytes = 4 * kPlaneRows;
  const int64_t n_words = plane_words(p.n_cols), n_groups = plane_groups(p);
  const int levels = ((1 << Bits) - 1) * ((1 << p.activation_bits) - 1);
  const float center = 0.5f * ((1 << Bits) - 1) - p.zero;
  const bool has_offset = p.has_minimum || center != 0.0f;
  const uint32_t* words[Tokens];
  for (int t = 0; t < Tokens; ++t) {
    words[t] = x.words + (token + t) * p.activation_bits * n_words;
    out[t] = set1(0.0f);
  }
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t left = p.n_cols - g * p.group, columns = left < p.group ? left : p.group;
    const uint8_t *scales = tile + 2 * row0, *minimums = scales + 2 * kPlaneRows;
    tile += 2 * kPlaneRows * (p.has_minimum ? 2 : 1);
    I sum[Tokens];
    for (int t = 0; t < Tokens; ++t) sum[t] = zero_int();
    for (int64_t step = plane_words(columns); step > 0; step -= kStepWords) {
      const int64_t n = step < kStepWords ? step : kStepWords, bytes = n * Bits * vector_bytes;
      fetch_ahead(tile, bytes);
      I joined[Tokens];
      for (int t = 0; t < Tokens; ++t) joined[t] = zero_int();
      for (int j = p.activation_bits - 1; j >= 0; --j) {
        Counts counts[Tokens][Bits];
        BAREFOOT_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          BAREFOOT_UNROLL
          for (int i = 0; i < Bits; ++i) counts[t][i] = zero_counts();
        }
        const uint8_t* from = tile + 4 * row0;
        for (int64_t k = 0; k < n; ++k) {
          Words repeated[Tokens];
          BAREFOOT_UNROLL
          for (int t = 0; t < Tokens; ++t) repeated[t] = repeat_word(words[t][j * n_words + k]);
          BAREFOOT_UNROLL
          for (int i = 0; i < Bits; ++i, from += vector_bytes) {
            const Words w = load_words(from);
            BAREFOOT_UNROLL
            for (int t = 0; t < Tokens; ++t) counts[t][i] = count(counts[t][i], w, repeated[t]);
          }
        }
        BAREFOOT_UNROLL
        for (int t = 0; t < Tokens; ++t) {
          I planes = total(counts[t][Bits - 1]);
          BAREFOOT_UNROLL
          for (int i = Bits - 2; i >= 0; --i) planes = shift_left<1>(planes) + total(counts[t][i]);
          joined[t] = shift_left<1>(joined[t]) + planes;
        }
      }
      for (int t = 0; t < Tokens; ++t) {
        sum[t] = sum[t] + joined[t];
        words[t] += n;
      }
      tile += bytes;
    }
    // Twice the count may pass 2^31; what remains of the product modulo 2^32 is right, as its magnitude stays below.
    const I most = set_int(static_cast<int32_t>(columns) * levels);
    const F scale = load_half(scales);
    for (int t = 0; t < Tokens; ++t) {
      const int64_t at = (token + t) * n_groups + g;
      out[t] = fma(to_float(most - shift_left<1>(sum[t])), scale * set1(x.scale[at]), out[t]);
      if (has_offset) {
        F offset = scale * set1(center);
        if (p.has_minimum) offset = offset + load_half(minimums);
        out[t] = fma(offset, set1(x.sum[at]), out[t]);
      }
    }
  }
}

template <int Bits>
void multiply_plane_tile(const PlaneArgs& p, const PlaneInput& x, int64_t tile) {
  constexpr int most_tokens = Bits > kCounters ? 1 : kCounters / Bits > 4 ? 4 : kCounters / Bits;
  const uint8_t* const data = p.weight + tile * plane_tile_bytes(p);
  const int64_t first = tile * kPlaneRows, n_rows = p.n_rows - first < kPlaneRows ? p.n_rows - first : kPlaneRows;
  int64_t token = 0;
  const auto take = [&](auto tokens) {
    for (; token + tokens.value <= p.n_tokens; token += tokens.value) {
      for (int row0 = 0; row0 < n_rows; row0 += kLanes) {
        F product[tokens.value];
        multiply_planes<Bits, tokens.value>(p, x, data, row0, token, product);
        for (int t = 0; t < tokens.value; ++t) {
          float each[kLanes], *to = p.out + (token + t) * p.n_rows + first + row0;
          store(each, product[t]);
          for (int r = 0; r < kLanes && row0 + r < n_rows; ++r) to[r] = p.add ? to[r] + each[r] : each[r];
        }
      }
    }
  };
  take(Constant<most_tokens>{});
  take(Constant<1>{});
}

inline PlaneInput lay_out_planes(const PlaneArgs& p, int64_t* n_bytes) {
  uint8_t* const base = p.scratch + (kAlign - reinterpret_cast<uintptr_t>(p.scratch) % kAlign) % kAlign;
  const int64_t planes = round_up(4 * p.n_tokens * p.activation_bits * plane_words(p.n_cols), kAlign);
  const int64_t scales = round_up(4 * p.n_tokens * plane_groups(p), kAlign);
  *n_bytes = kAlign + planes + 2 * scales;
  return {reinterpret_cast<uint32_t*>(base), reinterpret_cast<float*>(base + planes),
          reinterpret_cast<float*>(base + planes + scales)};
}

inline int64_t plane_scratch(const PlaneArgs& p) {
  int64_t n_bytes;
  lay_out_planes(p, &n_bytes);
  return n_bytes;
}

inline void plane_matmul(const PlaneArgs& p) {
  int64_t n_bytes;
  const PlaneInput x = lay_out_planes(p, &n_bytes);
  const int64_t n_groups = plane_groups(p), n_words = plane_words(p.n_cols);
  parallel_for(p.n_tokens * n_groups, p.n_tokens * p.n_cols < kParallel ? 1 : p.n_threads, [&](int64_t task, int) {
    const int64_t t = task / n_groups, k = task % n_groups * p.group;
    split_group(p.x + t * p.n_cols + k, p.n_cols - k < p.group ? p.n_cols - k : p.group, p.activation_bits,
                x.words + t * p.activation_bits * n_words + k / 32, n_words, x.scale + task, x.sum + task);
  });
  static constexpr decltype(&multiply_plane_tile<1>) multiply[] = {
      &multiply_plane_tile<1>, &multiply_plane_tile<2>, &multiply_plane_tile<3>, &multiply_plane_tile<4>,
      &multiply_plane_tile<5>, &multiply_plane_tile<6>, &multiply_plane_tile<7>, &multiply_plane_tile<8>};
  const int64_t n_tiles = plane_tiles(p), share = n_tiles / (8 * p.n_threads) + 1;
  parallel_for((n_tiles + share - 1) / share, p.n_threads, [&](int64_t task, int) {
    const int64_t end = (task + 1) * share < n_tiles ? (task + 1) * share : n_tiles;
    for (int64_t tile = task * share; tile < end; ++tile) multiply[p.weight_bits - 1](p, x, tile);
  });
}
