// Products by table look-up, one bit plane at a time; lut.py describes the layout bit by bit and the arithmetic.
//
// A table holds the 16 sums ±x0 ±x1 ±x2 ±x3 of a run of four activations, so four weights of one bit each are one index
// into it, and 16 to 64 indices go through one byte shuffle. There are no products in the inner loop.
#pragma once

constexpr int kRuns = static_cast<int>(kGroup) / 4;  // runs of four activations that share a table scale
constexpr int kTable = 16;                           // bytes of a table

struct LutTables {    // for each token and 32 columns
  uint8_t* table;     // [kRuns][kTable]: 128 + the sum in units of the table's scale
  float* half_scale;  // half the scale of these tables
  float* sum;         // of the activations
};

// --- vectors of table indices ---
//
//   Bytes   kBytes indices or table entries       Shorts   kBytes / 2 sums of int16
//   add_pairs(s, b, w0, w1)   s[i] + w0 b[2i] + w1 b[2i + 1], b unsigned

#if defined(__AVX512BW__)
constexpr int kBytes = 64;
struct Bytes {
  __m512i v;
};
struct Shorts {
  __m512i v;
};
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes repeat_table(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Bytes low_halves(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_halves(Bytes a) { return low_halves({_mm512_srli_epi16(a.v, 4)}); }
inline Bytes look_up(Bytes table, Bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }
inline Shorts set1_shorts(int a) { return {_mm512_set1_epi16(static_cast<int16_t>(a))}; }
inline Shorts operator+(Shorts a, Shorts b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Shorts operator-(Shorts a, Shorts b) { return {_mm512_sub_epi16(a.v, b.v)}; }
template <int N>
inline Shorts shift_up(Shorts a) {
  return {_mm512_slli_epi16(a.v, N)};
}
inline Shorts as_shorts(Bytes a) { return {a.v}; }
inline Shorts odd_bytes(Bytes a) { return {_mm512_srli_epi16(a.v, 8)}; }
inline Shorts add_pairs(Shorts s, Bytes a, int w0, int w1) {
  return {_mm512_add_epi16(s.v, _mm512_maddubs_epi16(a.v, _mm512_set1_epi16(static_cast<int16_t>(w1 << 8 | w0))))};
}
inline void store(int16_t* p, Shorts a) { _mm512_storeu_si512(p, a.v); }
inline F load_shorts(const int16_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load_256(p)))}; }

#elif defined(__AVX2__)
constexpr int kBytes = 32;
struct Bytes {
  __m256i v;
};
struct Shorts {
  __m256i v;
};
inline Bytes load_bytes(const uint8_t* p) { return {load_256(p)}; }
inline Bytes repeat_table(const uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Bytes low_halves(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_halves(Bytes a) { return low_halves({_mm256_srli_epi16(a.v, 4)}); }
inline Bytes look_up(Bytes table, Bytes index) { return {_mm256_shuffle_epi8(table.v, index.v)}; }
inline Shorts set1_shorts(int a) { return {_mm256_set1_epi16(static_cast<int16_t>(a))}; }
inline Shorts operator+(Shorts a, Shorts b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Shorts operator-(Shorts a, Shorts b) { return {_mm256_sub_epi16(a.v, b.v)}; }
template <int N>
inline Shorts shift_up(Shorts a) {
  return {_mm256_slli_epi16(a.v, N)};
}
inline Shorts as_shorts(Bytes a) { return {a.v}; }
inline Shorts odd_bytes(Bytes a) { return {_mm256_srli_epi16(a.v, 8)}; }
inline Shorts add_pairs(Shorts s, Bytes a, int w0, int w1) {
  return {_mm256_add_epi16(s.v, _mm256_maddubs_epi16(a.v, _mm256_set1_epi16(static_cast<int16_t>(w1 << 8 | w0))))};
}
inline void store(int16_t* p, Shorts a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline F load_shorts(const int16_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

#elif defined(__ARM_NEON) && defined(__aarch64__)
constexpr int kBytes = 16;
struct Bytes {
  uint8x16_t v;
};
struct Shorts {
  int16x8_t v;
};
inline Bytes load_bytes(const uint8_t* p) { return {vld1q_u8(p)}; }
inline Bytes repeat_table(const uint8_t* p) { return {vld1q_u8(p)}; }
inline Bytes low_halves(Bytes a) { return {vandq_u8(a.v, vdupq_n_u8(15))}; }
inline Bytes high_halves(Bytes a) { return {vshrq_n_u8(a.v, 4)}; }
inline Bytes look_up(Bytes table, Bytes index) { return {vqtbl1q_u8(table.v, index.v)}; }
inline Shorts set1_shorts(int a) { return {vdupq_n_s16(static_cast<int16_t>(a))}; }
inline Shorts operator+(Shorts a, Shorts b) { return {vaddq_s16(a.v, b.v)}; }
inline Shorts operator-(Shorts a, Shorts b) { return {vsubq_s16(a.v, b.v)}; }
template <int N>
inline Shorts shift_up(Shorts a) {
  return {vshlq_n_s16(a.v, N)};
}
inline Shorts as_shorts(Bytes a) { return {vreinterpretq_s16_u8(a.v)}; }
inline Shorts odd_bytes(Bytes a) { return {vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_u8(a.v), 8))}; }
inline Shorts add_pairs(Shorts s, Bytes a, int w0, int w1) {
  const int16x8_t even = vandq_s16(vreinterpretq_s16_u8(a.v), vdupq_n_s16(255));
  s.v = vmlaq_n_s16(s.v, even, static_cast<int16_t>(w0));
  return {vmlaq_n_s16(s.v, odd_bytes(a).v, static_cast<int16_t>(w1))};
}
inline void store(int16_t* p, Shorts a) { vst1q_s16(p, a.v); }

#else
constexpr int kBytes = 16;
struct Bytes {
  uint8_t v[16];
};
struct Shorts {
  uint16_t v[8];
};
inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, 16);
  return r;
}
inline Bytes repeat_table(const uint8_t* p) { return load_bytes(p); }
inline Bytes low_halves(Bytes a) {
  for (uint8_t& b : a.v) b &= 15;
  return a;
}
inline Bytes high_halves(Bytes a) {
  for (uint8_t& b : a.v) b >>= 4;
  return a;
}
inline Bytes look_up(Bytes table, Bytes index) {
  for (uint8_t& b : index.v) b = table.v[b];
  return index;
}
inline Shorts set1_shorts(int a) {
  Shorts r;
  for (uint16_t& s : r.v) s = static_cast<uint16_t>(a);
  return r;
}
inline Shorts operator+(Shorts a, Shorts b) {
  for (int i = 0; i < 8; ++i) a.v[i] = static_cast<uint16_t>(a.v[i] + b.v[i]);
  return a;
}
inline Shorts operator-(Shorts a, Shorts b) {
  for (int i = 0; i < 8; ++i) a.v[i] = static_cast<uint16_t>(a.v[i] - b.v[i]);
  return a;
}
template <int N>
inline Shorts shift_up(Shorts a) {
  for (uint16_t& s : a.v) s = static_cast<uint16_t>(s << N);
  return a;
}
inline Shorts as_shorts(Bytes a) {
  Shorts r;
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<uint16_t>(a.v[2 * i] | a.v[2 * i + 1] << 8);
  return r;
}
inline Shorts odd_bytes(Bytes a) {
  Shorts r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[2 * i + 1];
  return r;
}
inline Shorts add_pairs(Shorts s, Bytes a, int w0, int w1) {
  for (int i = 0; i < 8; ++i) s.v[i] = static_cast<uint16_t>(s.v[i] + w0 * a.v[2 * i] + w1 * a.v[2 * i + 1]);
  return s;
}
inline void store(int16_t* p, Shorts a) { std::memcpy(p, a.v, sizeof a.v); }
#endif

#if !defined(__AVX2__)
inline F load_shorts(const int16_t* p) {
  float each[kLanes];
  for (int i = 0; i < kLanes; ++i) each[i] = static_cast<float>(p[i]);
  return load(each);
}
#endif

// --- tables of 32 activations ---

// Only the eight sums with -x3 are computed: T[15 - j] = -T[j], which as 128 + q is 256 - entry.
inline void build_tables(const float* x, uint8_t* table, float* half_scale, float* sum) {
  float largest = 0.0f, total = 0.0f;
  bool finite = true;
  for (int r = 0; r < kRuns; ++r) {
    const float* run = x + 4 * r;
    const float reach = (std::fabs(run[0]) + std::fabs(run[1])) + (std::fabs(run[2]) + std::fabs(run[3]));
    finite = finite && reach <= 3.4028234663852886e38f;
    largest = reach > largest ? reach : largest;
    total += (run[0] + run[1]) + (run[2] + run[3]);
  }
  const bool used = finite && largest >= kSmallest;
  const float inverse = used ? 127.0f / largest : 0.0f;
  *half_scale = finite ? (used ? 0.5f * (largest / 127.0f) : 0.0f) : NAN;
  *sum = finite ? (used ? total : 0.0f) : NAN;
  static constexpr float sign[3][8] = {
      {-1, 1, -1, 1, -1, 1, -1, 1}, {-1, -1, 1, 1, -1, -1, 1, 1}, {-1, -1, -1, -1, 1, 1, 1, 1}};
  for (int r = 0; r < kRuns; ++r, table += kTable) {
    float a[4];
    for (int i = 0; i < 4; ++i) a[i] = used ? x[4 * r + i] * inverse : 0.0f;
    uint8_t half[8];
    for (int j = 0; j < 8; ++j) {
      // Adding 1.5 * 2^23 + 128 rounds to the nearest integer and leaves it, 128 higher, in the low byte.
      const float shifted = (sign[0][j] * a[0] + sign[1][j] * a[1]) + (sign[2][j] * a[2] - a[3]) + 12583040.0f;
      uint32_t bits;
      std::memcpy(&bits, &shifted, 4);
      half[j] = static_cast<uint8_t>(bits);
    }
    for (int j = 0; j < 8; ++j) table[j] = half[j];
    for (int j = 0; j < 8; ++j) table[8 + j] = static_cast<uint8_t>(-half[7 - j]);
  }
}

// --- the layout ---

template <int Bits, bool HasOffset, int Zero>
struct Lut {
  static constexpr int bits = Bits, zero = Zero;
  static constexpr bool has_offset = HasOffset;
  static constexpr int rows = static_cast<int>(kLutRows);
  static constexpr int header = 2 * rows * (HasOffset ? 2 : 1);
  static constexpr int run_pair_bytes = rows * bits;
  static constexpr int chunk_bytes = kRuns / 2 * run_pair_bytes;
  static constexpr int64_t group_bytes(int64_t chunks) { return header + chunks * chunk_bytes; }

  // Byte, within a pair of runs, that holds one plane of a row.
  static constexpr int place(int row, int plane) {
    if (plane < bits / 2 * 2) return 2 * rows * (plane / 2) + 2 * row + plane % 2;
    return rows * plane + (row < rows / 2 ? 2 * row : 2 * row - rows + 1);
  }

  // Four codes of a run, one a byte.
  static uint32_t quad(const uint8_t* chunk, int row, int run) {
    uint32_t codes = 0;
    for (int plane = 0; plane < bits; ++plane) {
      const uint32_t index = chunk[run / 2 * run_pair_bytes + place(row, plane)] >> (4 * (run % 2)) & 15u;
      codes |= (index * 0x00204081u & 0x01010101u) << plane;  // bit t to byte t
    }
    return codes;
  }

  static F scales(const uint8_t* group, int row) { return load_half(group + 2 * row); }
  static F offsets(const uint8_t* group, int row, float per_scale) {
    const F scaled = scales(group, row) * set1(per_scale);
    if constexpr (HasOffset) return load_half(group + 2 * rows + 2 * row) + scaled;
    else return scaled;
  }
};

template <class Format>
using LutOf = Lut<Format::code_bits, Format::has_offset, Format::zero>;

// --- the product ---

// sums[row] = sum over planes of 2^plane * (sum over the 8 runs of a chunk of the table entries), exact in 16 bits:
// 15 planes' worth of 8 entries up to 127.
template <int Bits>
inline void look_up_chunk(const uint8_t* codes, const uint8_t* tables, int16_t* sums) {
  constexpr int n = 2 * static_cast<int>(kLutRows) / kBytes;  // vectors of sums
  constexpr bool pairs = Bits >= 2, single = Bits % 2 != 0;
  constexpr int paired_planes = Bits / 2 * 2;
  Shorts paired[n];
  Shorts both[n / 2], odd[n / 2];  // of the single plane: even rows' bytes + 256 * odd rows' bytes, and the latter
  if constexpr (pairs) {
    for (int i = 0; i < n; ++i) paired[i] = set1_shorts(-128 * kRuns * ((1 << paired_planes) - 1));
  }
  if constexpr (single) {
    for (int i = 0; i < n / 2; ++i) {
      both[i] = set1_shorts(-128 * kRuns * 257);
      odd[i] = set1_shorts(-128 * kRuns);
    }
  }
  BAREFOOT_UNROLL
  for (int p = 0; p < kRuns / 2; ++p, tables += 2 * kTable) {
    const Bytes first = repeat_table(tables), second = repeat_table(tables + kTable);
    BAREFOOT_UNROLL
    for (int set = 0; set < Bits / 2; ++set) {
      BAREFOOT_UNROLL
      for (int i = 0; i < n; ++i, codes += kBytes) {
        const Bytes packed = load_bytes(codes);
        const int weight = 1 << (2 * set);
        paired[i] = add_pairs(paired[i], look_up(first, low_halves(packed)), weight, 2 * weight);
        paired[i] = add_pairs(paired[i], look_up(second, high_halves(packed)), weight, 2 * weight);
      }
    }
    if constexpr (single) {
      BAREFOOT_UNROLL
      for (int i = 0; i < n / 2; ++i, codes += kBytes) {
        const Bytes packed = load_bytes(codes);
        const Bytes a = look_up(first, low_halves(packed)), b = look_up(second, high_halves(packed));
        both[i] = both[i] + as_shorts(a) + as_shorts(b);
        odd[i] = odd[i] + odd_bytes(a) + odd_bytes(b);
      }
    }
  }
  if constexpr (single) {
    for (int i = 0; i < n / 2; ++i) {
      Shorts low = both[i] - shift_up<8>(odd[i]), high = odd[i];
      if constexpr (pairs) {
        low = paired[i] + shift_up<paired_planes>(low);
        high = paired[n / 2 + i] + shift_up<paired_planes>(high);
      }
      store(sums + i * (kBytes / 2), low);
      store(sums + (n / 2 + i) * (kBytes / 2), high);
    }
  } else {
    for (int i = 0; i < n; ++i) store(sums + i * (kBytes / 2), paired[i]);
  }
}

// out[t][r] (+)= row r of the panel · token t, up to kFewLutTokens tokens.
template <class L>
void look_up_panel(const uint8_t* panel, int64_t chunks, const LutTables& x, int64_t n_tokens, int64_t n_cols,
                   float* out, int64_t out_stride, bool add) {
  constexpr int n = L::rows / kLanes;
  // q = (sum of 2^plane ±1) / 2 + (2^bits - 1) / 2; the second term and the zero point meet the sum of x.
  constexpr float per_scale = 0.5f * ((1 << L::bits) - 1) - static_cast<float>(L::zero);
  const int64_t groups32 = n_cols / kGroup, group_bytes = L::group_bytes(chunks);
  float total[kFewLutTokens][L::rows] = {};
  const uint8_t* group = panel;
  for (int64_t g = 0; g < groups32; g += chunks, group += group_bytes) {
    fetch_ahead(group, group_bytes);
    for (int64_t t = 0; t < n_tokens; ++t) {
      const int64_t at = t * groups32 + g;
      F sum[n];
      for (int i = 0; i < n; ++i) sum[i] = set1(0.0f);
      float sum_x = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        int16_t each[L::rows];
        look_up_chunk<L::bits>(group + L::header + c * L::chunk_bytes, x.table + (at + c) * kRuns * kTable, each);
        const F scale_x = set1(x.half_scale[at + c]);
        for (int i = 0; i < n; ++i) sum[i] = fma(load_shorts(each + i * kLanes), scale_x, sum[i]);
        sum_x += x.sum[at + c];
      }
      for (int i = 0; i < n; ++i) {
        float* to = total[t] + i * kLanes;
        const F product = fma(L::scales(group, i * kLanes), sum[i], load(to));
        store(to, fma(L::offsets(group, i * kLanes, per_scale), set1(sum_x), product));
      }
    }
  }
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int i = 0; i < n; ++i) {
      float* to = out + t * out_stride + i * kLanes;
      const F product = load(total[t] + i * kLanes);
      store(to, add ? load(to) + product : product);
    }
  }
}

// Columns k0 .. k0 + n - 1 of rows row0 .. row0 + 31 of a panel into a tile.
template <class L>
void unpack_lut(const uint8_t* panel, int64_t chunks, int row0, int64_t k0, int64_t n, const Tile& tile) {
  const uint8_t* group = panel + k0 / kGroup / chunks * L::group_bytes(chunks);
  uint8_t* code_to = tile.code;
  float *scale_to = tile.scale, *offset_to = tile.offset;
  for (int64_t k = 0; k < n; k += chunks * kGroup, group += L::group_bytes(chunks)) {
    for (int64_t c = 0; c < chunks; ++c, scale_to += kRowTile, offset_to += kRowTile) {
      const uint8_t* chunk = group + L::header + c * L::chunk_bytes;
      for (int row = 0; row < kRowTile; row += kLanes) {
        store(scale_to + row, L::scales(group, row0 + row));
        store(offset_to + row, L::offsets(group, row0 + row, -static_cast<float>(L::zero)));
      }
      for (int run = 0; run < kRuns; ++run, code_to += 4 * kRowTile) {
        for (int row = 0; row < kRowTile; ++row) {
          const uint32_t codes = L::quad(chunk, row0 + row, run);
          std::memcpy(code_to + 4 * row, &codes, 4);
        }
      }
    }
  }
}

// As dequantize_row, bit for bit.
template <class Format>
void dequantize_lut(const uint8_t* data, int64_t n_cols, int64_t row, int64_t k0, int64_t n, float* out) {
  using L = LutOf<Format>;
  constexpr int chunks = Format::elements / 32;
  constexpr int64_t group_bytes = L::group_bytes(chunks);
  static_assert(group_bytes == L::rows * Format::bytes);
  const int lane = static_cast<int>(row % L::rows);
  const uint8_t* group = data + (row / L::rows * n_cols + k0) / Format::elements * group_bytes;
  for (; n > 0; n -= Format::elements, group += group_bytes) {
    const float scale = half_at(group + 2 * lane);
    for (int run = 0; run < chunks * kRuns; ++run, out += 4) {
      const uint8_t* chunk = group + L::header + run / kRuns * L::chunk_bytes;
      const uint32_t codes = L::quad(chunk, lane, run % kRuns);
      for (int i = 0; i < 4; ++i) {
        const float product = scale * static_cast<float>(static_cast<int>(codes >> (8 * i) & 255u) - Format::zero);
        if constexpr (Format::has_offset) out[i] = product + half_at(group + 2 * L::rows + 2 * lane);
        else out[i] = product;
      }
    }
  }
}

// One panel of 64 row-major rows into this layout.
template <class Format>
void pack_lut_panel(const uint8_t* rows, int64_t n_cols, uint8_t* out) {
  using L = LutOf<Format>;
  constexpr int chunks = Format::elements / 32;
  constexpr int64_t group_bytes = L::group_bytes(chunks);
  static_assert(group_bytes == L::rows * Format::bytes);
  const int64_t n_groups = n_cols / Format::elements, row_bytes = n_groups * Format::bytes;
  for (int64_t g = 0; g < n_groups; ++g) {
    uint8_t* group = out + g * group_bytes;
    std::memset(group + L::header, 0, group_bytes - L::header);
    for (int row = 0; row < L::rows; ++row) {
      const uint8_t* block = rows + row * row_bytes + g * Format::bytes;
      std::memcpy(group + 2 * row, block, 2);
      if constexpr (Format::has_offset) std::memcpy(group + 2 * L::rows + 2 * row, block + 2, 2);
      BAREFOOT_UNROLL
      for (int c = 0; c < chunks; ++c) {
        uint8_t code[32], *chunk = group + L::header + c * L::chunk_bytes;
        store(code, Format::codes(block, c));
        for (int run = 0; run < kRuns; ++run) {
          const uint32_t codes = read<uint32_t>(code + 4 * run);
          for (int plane = 0; plane < L::bits; ++plane) {
            const uint32_t index = (codes >> plane & 0x01010101u) * 0x01020408u >> 24;  // bit of byte t to bit t
            chunk[run / 2 * L::run_pair_bytes + L::place(row, plane)] |= static_cast<uint8_t>(index << (4 * (run % 2)));
          }
        }
      }
    }
  }
}
