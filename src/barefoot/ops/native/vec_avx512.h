// 512-bit vectors: AVX-512 F, BW, DQ, VL, and VNNI where BAREFOOT_VNNI says so. Names: see vec_portable.h.
#pragma once

#include "vec_x86_codes.h"

constexpr int kLanes = 16;
constexpr int kTileTokens = 6, kTileVectors = 2;
constexpr int kDotTokens = 4;
constexpr int kMixVectors = 4;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline F load(const void* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F set1(float a) { return {_mm512_set1_ps(a)}; }
inline F load_half(const void* p) { return {_mm512_cvtph_ps(load_256(p))}; }
inline void store_half(void* p, F a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F swap_pairs(F a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F where_less(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F round_nearest(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F power_of_two(F a) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline F scale_down(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float reduce_add(F a) {
  return reduce_add_256(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
inline float reduce_add(Lanes8 a) { return reduce_add_256(a); }
inline float reduce_max(F a) { return _mm512_reduce_max_ps(a.v); }
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 quad[16];  // quad[4 * g + i]: columns i, 4 + i, 8 + i, 12 + i of rows 4 * g .. 4 * g + 3
  for (int g = 0; g < 4; ++g) {
    const float* row = from + 4 * g * from_stride;
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + from_stride);
    const __m512 c = _mm512_loadu_ps(row + 2 * from_stride), d = _mm512_loadu_ps(row + 3 * from_stride);
    const __m512 ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
    const __m512 cd_low = _mm512_unpacklo_ps(c, d), cd_high = _mm512_unpackhi_ps(c, d);
    quad[4 * g] = _mm512_shuffle_ps(ab_low, cd_low, 0x44);
    quad[4 * g + 1] = _mm512_shuffle_ps(ab_low, cd_low, 0xee);
    quad[4 * g + 2] = _mm512_shuffle_ps(ab_high, cd_high, 0x44);
    quad[4 * g + 3] = _mm512_shuffle_ps(ab_high, cd_high, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 low_01 = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0x44);
    const __m512 high_01 = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0xee);
    const __m512 low_23 = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0x44);
    const __m512 high_23 = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0xee);
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(low_01, low_23, 0x88));
    _mm512_storeu_ps(to + (4 + i) * to_stride, _mm512_shuffle_f32x4(low_01, low_23, 0xdd));
    _mm512_storeu_ps(to + (8 + i) * to_stride, _mm512_shuffle_f32x4(high_01, high_23, 0x88));
    _mm512_storeu_ps(to + (12 + i) * to_stride, _mm512_shuffle_f32x4(high_01, high_23, 0xdd));
  }
}
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline void store_bytes(uint8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

using Quads = __m512i;
inline I zero_int() { return {_mm512_setzero_si512()}; }
inline I set_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline Quads load_quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Quads repeat_quad(const int8_t* p) {
  int quad;
  std::memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
inline I widen_bytes(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_quads(uint8_t* p, Quads a) { _mm512_storeu_si512(p, a); }
inline Quads spread_bits(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  return _mm512_maskz_set1_epi8(bits, 1);
}
template <int Column>
inline F negate_where(Quads bits, F a) {
  const __m512i moved = _mm512_slli_epi32(bits, 31 - 8 * Column), sign = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), moved, sign, 0x78))};  // a ^ (b & c)
}
inline I set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I magnitude_bits(F a) { return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MAX))}; }
inline float largest_magnitude(I a) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(a.v))));
}
template <int Count>
inline I shift_left(I a) {
  return {_mm512_slli_epi32(a.v, Count)};
}
template <int Shift>
inline Quads field(Quads a, int mask) {
  if constexpr (Shift > 0) a = _mm512_srli_epi16(a, Shift);
  if constexpr (Shift < 0) a = _mm512_slli_epi16(a, -Shift);
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask)));
}
inline Quads merge(Quads a, Quads b) { return _mm512_or_si512(a, b); }
// Entry code % 16 of a table of 16 bytes, for each byte; codes are below 128.
inline Quads shuffle(const uint8_t* table, Quads code) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), code);
}
template <int Bit>
inline Quads where_bit(Quads code, Quads yes, Quads no) {
  return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(code, _mm512_set1_epi8(1 << Bit)), no, yes);
}
inline Quads where_equal(Quads code, int value, Quads yes, Quads no) {
  return _mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(static_cast<char>(value))), no, yes);
}
inline Quads flip_signs(Quads a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }
template <bool Wide>
inline I dot_quads(I sum, Quads w, Quads x) {
#if defined(BAREFOOT_VNNI)
  return {_mm512_dpbusd_epi32(sum.v, w, x)};
#else
  if (Wide) x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  const __m512i pairs16 = _mm512_maddubs_epi16(Wide ? _mm512_abs_epi8(w) : w, x);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs16, _mm512_set1_epi16(1)))};
#endif
}

// --- pairs of 16 bits ---

inline Quads keep_pairs(Quads a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi16(static_cast<short>(mask))); }
template <int Count>
inline Quads shift_pairs(Quads a) {
  if constexpr (Count < 0) return _mm512_slli_epi16(a, -Count);
  else return _mm512_srli_epi16(a, Count);
}
inline I dot_pairs(I sum, Quads a, Quads b) {
#if defined(BAREFOOT_VNNI)
  return {_mm512_dpwssd_epi32(sum.v, a, b)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a, b))};
#endif
}
inline void store_pairs(int16_t* p, F a, F b) {
  const __m512i even = _mm512_castps_si512(a.v), odd = _mm512_slli_epi32(_mm512_castps_si512(b.v), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd));
}

struct Woven {
  __m512i low, high;  // pairs of elements 0..7, 16..23 and of 8..15, 24..31
};
struct Sums32 {
  __m512i low, high;
};
inline Woven weave(Codes a, Codes b) {
  return {_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a.v, b.v)), _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a.v, b.v))};
}
inline Sums32 zero_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline void add_rows(Sums32& sum, const Woven& rows, const int16_t* weights) {
  int pair;
  std::memcpy(&pair, weights, 4);
  const __m512i both = _mm512_set1_epi32(pair);
#if defined(BAREFOOT_VNNI)
  sum.low = _mm512_dpwssd_epi32(sum.low, rows.low, both);
  sum.high = _mm512_dpwssd_epi32(sum.high, rows.high, both);
#else
  sum.low = _mm512_add_epi32(sum.low, _mm512_madd_epi16(rows.low, both));
  sum.high = _mm512_add_epi32(sum.high, _mm512_madd_epi16(rows.high, both));
#endif
}
inline void add_scaled(float* to, const Sums32& sum, float scale, float offset) {
  const __m512 factor = _mm512_set1_ps(scale), more = _mm512_set1_ps(offset);
  const __m512i first = _mm512_shuffle_i64x2(sum.low, sum.high, 0x44);
  const __m512i second = _mm512_shuffle_i64x2(sum.low, sum.high, 0xee);
  const auto add = [&](float* at, __m512i part) {
    const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), factor, more);
    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), value));
  };
  add(to, first);
  add(to + 16, second);
}
