// Codes and dot products of 32 elements in 256-bit registers, shared by the AVX2 and AVX-512 vectors.
#pragma once

#if defined(BAREFOOT_VNNI)
constexpr bool kUnsignedBytes = true;
#else
constexpr bool kUnsignedBytes = false;
#endif

inline float half_to_float(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
inline uint16_t float_to_half(float value) {
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT), 0));
}

struct Codes {
  __m256i v;
};
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Codes nibbles(const uint8_t* p) {
  // The upper copy is shifted by a half byte; loads and shifts leave the shuffle port to the scales.
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_and_si256(_mm256_srlv_epi64(both, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15))};
}
inline Codes pairs(const uint8_t* p) {
  long long packed;
  std::memcpy(&packed, p, 8);
  const __m256i shifted = _mm256_srlv_epi64(_mm256_set1_epi64x(packed), _mm256_set_epi64x(6, 4, 2, 0));
  return {_mm256_and_si256(shifted, _mm256_set1_epi8(3))};
}
inline Codes bits(const uint8_t* p, int value) {
  int packed;
  std::memcpy(&packed, p, 4);
  // Byte i of the register gets byte i / 8 of the number, then keeps only bit i % 8.
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(packed), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
  const __m256i own = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
  return {_mm256_and_si256(is_set, _mm256_set1_epi8(static_cast<char>(value)))};
}
inline Codes field(const uint8_t* p, int shift, int mask) {
  const __m256i shifted = _mm256_srl_epi16(load_256(p), _mm_cvtsi32_si128(shift));
  return {_mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)))};
}
inline Codes raise(Codes a, int shift) { return {_mm256_sll_epi16(a.v, _mm_cvtsi32_si128(shift))}; }
inline Codes operator|(Codes a, Codes b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Codes plain_bytes(const uint8_t* p, int flip) {
  return {_mm256_xor_si256(load_256(p), _mm256_set1_epi8(static_cast<char>(flip)))};
}
inline void store(uint8_t* p, Codes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }

using Lanes8 = __m256;
using Sums8 = __m256i;

// Sums of four neighbouring products. Without VNNI pairs are added in 16 bits: codes up to 127 (or, for Wide, signed
// codes whose sign moves to x, up to 128) times 127 stay below 2^15 - 1.
template <bool Wide>
inline Sums8 dot_codes(Codes w, const int8_t* x) {
#if defined(BAREFOOT_VNNI)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), w.v, load_256(x));
#else
  const __m256i pairs16 = Wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(w.v), _mm256_sign_epi8(load_256(x), w.v))
                               : _mm256_maddubs_epi16(w.v, load_256(x));
  return _mm256_madd_epi16(pairs16, _mm256_set1_epi16(1));
#endif
}
inline Lanes8 zero_lanes() { return _mm256_setzero_ps(); }
inline Lanes8 accumulate(Lanes8 sum, Sums8 a, float low, float high) {
  const __m256 scale = _mm256_insertf128_ps(_mm256_set1_ps(low), _mm_set1_ps(high), 1);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), scale, sum);
}
inline Lanes8 accumulate(Lanes8 sum, Sums8 a, float scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps(scale), sum);
}
inline float reduce_add_256(__m256 a) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  r = _mm_add_ss(r, _mm_movehdup_ps(r));
  return _mm_cvtss_f32(r);
}
