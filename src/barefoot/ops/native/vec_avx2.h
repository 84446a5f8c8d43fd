// 256-bit vectors: AVX2, FMA, F16C. The names are explained in vec_portable.h.
#pragma once

#include "vec_x86_codes.h"

constexpr int kLanes = 8;
constexpr int kTileTokens = 4, kTileVectors = 1;
constexpr int kDotTokens = 2;
constexpr int kMixVectors = 2;

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};

inline F load(const void* p) { return {_mm256_loadu_ps(static_cast<const float*>(p))}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F set1(float a) { return {_mm256_set1_ps(a)}; }
inline F load_half(const void* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
inline void store_half(void* p, F a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F swap_pairs(F a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F where_less(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline F round_nearest(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F power_of_two(F a) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline F scale_down(F a, F n) {
  return where_less(n, set1(-126.0f), set1(0.0f), a * power_of_two(max(set1(-126.0f), n)));
}
inline float reduce_add(F a) { return reduce_add_256(a.v); }
inline float reduce_add(Lanes8 a) { return reduce_add_256(a); }
inline float reduce_max(F a) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  r = _mm_max_ss(r, _mm_movehdup_ps(r));
  return _mm_cvtss_f32(r);
}
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 quad[8];  // quad[i]: columns i % 4 and 4 + i % 4 of rows 0..3 (i < 4) or 4..7
  for (int h = 0; h < 2; ++h) {
    const float* row = from + 4 * h * from_stride;
    const __m256 a = _mm256_loadu_ps(row), b = _mm256_loadu_ps(row + from_stride);
    const __m256 c = _mm256_loadu_ps(row + 2 * from_stride), d = _mm256_loadu_ps(row + 3 * from_stride);
    const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    quad[4 * h] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    quad[4 * h + 1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    quad[4 * h + 2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    quad[4 * h + 3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * to_stride, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31));
  }
}
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline void store_bytes(uint8_t* p, F a) {
  const __m256i integers = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

using Quads = __m256i;
inline I zero_int() { return {_mm256_setzero_si256()}; }
inline I set_int(int32_t a) { return {_mm256_set1_epi32(a)}; }
inline Quads load_quads(const uint8_t* p) { return load_256(p); }
inline Quads repeat_quad(const int8_t* p) {
  int quad;
  std::memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}
inline I widen_bytes(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_quads(uint8_t* p, Quads a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Quads spread_bits(const uint8_t* p) { return bits(p, 1).v; }
template <int Column>
inline F negate_where(Quads bits, F a) {
  const __m256i moved = _mm256_slli_epi32(bits, 31 - 8 * Column), sign = _mm256_set1_epi32(INT32_MIN);
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_and_si256(moved, sign)))};
}
inline I set1(int32_t a) { return {_mm256_set1_epi32(a)}; }
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I max(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline I magnitude_bits(F a) { return {_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(INT32_MAX))}; }
inline float largest_magnitude(I a) {
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1))));
}
template <int Count>
inline I shift_left(I a) {
  return {_mm256_slli_epi32(a.v, Count)};
}
template <int Shift>
inline Quads field(Quads a, int mask) {
  if constexpr (Shift > 0) a = _mm256_srli_epi16(a, Shift);
  if constexpr (Shift < 0) a = _mm256_slli_epi16(a, -Shift);
  return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask)));
}
inline Quads merge(Quads a, Quads b) { return _mm256_or_si256(a, b); }
// Entry code % 16 of a table of 16 bytes, for each byte; codes are below 128.
inline Quads shuffle(const uint8_t* table, Quads code) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), code);
}
template <int Bit>
inline Quads where_bit(Quads code, Quads yes, Quads no) {
  return _mm256_blendv_epi8(no, yes, _mm256_slli_epi16(code, 7 - Bit));
}
inline Quads where_equal(Quads code, int value, Quads yes, Quads no) {
  return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi8(code, _mm256_set1_epi8(static_cast<char>(value))));
}
inline Quads flip_signs(Quads a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }
template <bool Wide>
inline I dot_quads(I sum, Quads w, Quads x) {
  const __m256i pairs16 = Wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                               : _mm256_maddubs_epi16(w, x);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs16, _mm256_set1_epi16(1)))};
}

// --- pairs of 16 bits ---

inline Quads keep_pairs(Quads a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi16(static_cast<short>(mask))); }
template <int Count>
inline Quads shift_pairs(Quads a) {
  if constexpr (Count < 0) return _mm256_slli_epi16(a, -Count);
  else return _mm256_srli_epi16(a, Count);
}
inline I dot_pairs(I sum, Quads a, Quads b) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a, b))}; }
inline void store_pairs(int16_t* p, F a, F b) {
  const __m256i even = _mm256_castps_si256(a.v), odd = _mm256_slli_epi32(_mm256_castps_si256(b.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, odd, 0xaa));
}

struct Woven {
  __m256i v[4];  // pairs of elements 0..7, 16..23, 8..15, 24..31
};
struct Sums32 {
  __m256i v[4];
};
inline Woven weave(Codes a, Codes b) {
  const __m256i low = _mm256_unpacklo_epi8(a.v, b.v), high = _mm256_unpackhi_epi8(a.v, b.v);
  return {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(low)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(low, 1)),
           _mm256_cvtepi8_epi16(_mm256_castsi256_si128(high)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(high, 1))}};
}
inline Sums32 zero_sums() {
  const __m256i zero = _mm256_setzero_si256();
  return {{zero, zero, zero, zero}};
}
inline void add_rows(Sums32& sum, const Woven& rows, const int16_t* weights) {
  int pair;
  std::memcpy(&pair, weights, 4);
  const __m256i both = _mm256_set1_epi32(pair);
  for (int i = 0; i < 4; ++i) sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(rows.v[i], both));
}
inline void add_scaled(float* to, const Sums32& sum, float scale, float offset) {
  const __m256 factor = _mm256_set1_ps(scale), more = _mm256_set1_ps(offset);
  constexpr int order[] = {0, 16, 8, 24};
  for (int i = 0; i < 4; ++i) {
    const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.v[i]), factor, more);
    _mm256_storeu_ps(to + order[i], _mm256_add_ps(_mm256_loadu_ps(to + order[i]), value));
  }
}
