// Vectors in plain C++, written so that compilers turn the loops into what the target has (SSE2, NEON).
// The other vec_*.h offer the same names; kernels are written once against them.
//
//   F, I      kLanes float32 or int32            Codes   32 codes of 8 bits
//   Lanes8    the partial sums of one dot product of 32 elements; the lower half belongs to elements 0..15
//
// kUnsignedBytes: 8-bit codes are multiplied as unsigned (true) or signed (false) numbers.
#pragma once

constexpr int kLanes = 8;
constexpr int kTileTokens = 4, kTileVectors = 1;  // register block of the int8 tile product
constexpr int kDotTokens = 2;                     // of the float product: 4 rows by this many tokens
constexpr int kMixVectors = 2;                    // of the weighted sum of values
constexpr bool kUnsignedBytes = false;

inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias; subnormals come out right
  std::memcpy(&bits, &value, 4);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | magnitude << 13;
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    float small;
    std::memcpy(&small, &magnitude, 4);
    small += 0.5f;
    std::memcpy(&magnitude, &small, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};

#define BAREFOOT_EACH for (int i = 0; i < kLanes; ++i)

inline F load(const void* p) {
  F r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F set1(float a) {
  F r;
  BAREFOOT_EACH r.v[i] = a;
  return r;
}
inline F load_half(const void* p) {
  uint16_t half[kLanes];
  std::memcpy(half, p, sizeof half);
  F r;
  BAREFOOT_EACH r.v[i] = half_to_float(half[i]);
  return r;
}
inline void store_half(void* p, F a) {
  uint16_t half[kLanes];
  BAREFOOT_EACH half[i] = float_to_half(a.v[i]);
  std::memcpy(p, half, sizeof half);
}
inline F operator+(F a, F b) {
  BAREFOOT_EACH a.v[i] += b.v[i];
  return a;
}
inline F operator-(F a, F b) {
  BAREFOOT_EACH a.v[i] -= b.v[i];
  return a;
}
inline F operator*(F a, F b) {
  BAREFOOT_EACH a.v[i] *= b.v[i];
  return a;
}
inline F operator/(F a, F b) {
  BAREFOOT_EACH a.v[i] /= b.v[i];
  return a;
}
inline F fma(F a, F b, F c) {
  BAREFOOT_EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
// The second operand wins when either is NaN.
inline F max(F a, F b) {
  BAREFOOT_EACH b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}
inline F swap_pairs(F a) {  // lanes 0 and 1, 2 and 3, …
  F r;
  BAREFOOT_EACH r.v[i] = a.v[i ^ 1];
  return r;
}
inline F min(F a, F b) {
  BAREFOOT_EACH b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
inline F where_less(F a, F b, F yes, F no) {
  BAREFOOT_EACH no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return no;
}
// To the nearest integer, ties to even, for |a| < 2^22.
inline F round_nearest(F a) {
  BAREFOOT_EACH {
    const float shifted = a.v[i] + 12582912.0f;
    a.v[i] = shifted - 12582912.0f;
  }
  return a;
}
// 2^a for integers a in -126..127; any bits for NaN.
inline F power_of_two(F a) {
  BAREFOOT_EACH {
    const float shifted = a.v[i] + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    std::memcpy(&a.v[i], &bits, 4);
  }
  return a;
}
// a * 2^n for integers n <= 0; 0 where that is below 2^-126, or denormal; NaN stays.
inline F scale_down(F a, F n) {
  return where_less(n, set1(-126.0f), set1(0.0f), a * power_of_two(max(set1(-126.0f), n)));
}
inline float reduce_add(F a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline float reduce_max(F a) {
  float r = a.v[0];
  BAREFOOT_EACH r = a.v[i] > r ? a.v[i] : r;
  return r;
}
// to[c][r] = from[r][c] for a block of kLanes by kLanes.
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}
inline F to_float(I a) {
  F r;
  BAREFOOT_EACH r.v[i] = static_cast<float>(a.v[i]);
  return r;
}

inline void store_bytes(uint8_t* p, F a) {  // of integers in 0..255
  BAREFOOT_EACH p[i] = static_cast<uint8_t>(a.v[i]);
}

// --- int8 tiles: lane i is row i, 4 consecutive columns each ---

struct Quads {
  int8_t v[4 * kLanes];
};
inline I zero_int() { return I{}; }
inline I set_int(int32_t a) {
  I r;
  BAREFOOT_EACH r.v[i] = a;
  return r;
}
inline Quads load_quads(const uint8_t* p) {
  Quads r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Quads repeat_quad(const int8_t* p) {
  Quads r;
  for (int i = 0; i < kLanes; ++i) std::memcpy(r.v + 4 * i, p, 4);
  return r;
}
inline I widen_bytes(const uint8_t* p) {  // signed ones
  I r;
  BAREFOOT_EACH r.v[i] = static_cast<int8_t>(p[i]);
  return r;
}
inline void store_quads(uint8_t* p, Quads a) { std::memcpy(p, a.v, sizeof a.v); }
// Byte i becomes bit i of the 4 * kLanes bits at p: 0 or 1.
inline Quads spread_bits(const uint8_t* p) {
  Quads r;
  for (int i = 0; i < 4 * kLanes; ++i) r.v[i] = static_cast<int8_t>(p[i / 8] >> (i % 8) & 1);
  return r;
}
// Lanes whose byte of that column is 1 change their sign.
template <int Column>
inline F negate_where(Quads bits, F a) {
  BAREFOOT_EACH {
    uint32_t value;
    std::memcpy(&value, &a.v[i], 4);
    value ^= static_cast<uint32_t>(bits.v[4 * i + Column]) << 31;
    std::memcpy(&a.v[i], &value, 4);
  }
  return a;
}
inline I set1(int32_t a) {
  I r;
  BAREFOOT_EACH r.v[i] = a;
  return r;
}
inline I operator+(I a, I b) {  // modulo 2^32, as in the other registers
  BAREFOOT_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
  return a;
}
inline I max(I a, I b) {
  BAREFOOT_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// The bits of |a|: as integers they are in order, and NaN is the largest.
inline I magnitude_bits(F a) {
  I r;
  std::memcpy(r.v, a.v, sizeof r.v);
  BAREFOOT_EACH r.v[i] &= INT32_MAX;
  return r;
}
inline float largest_magnitude(I a) {
  int32_t bits = 0;
  BAREFOOT_EACH bits = a.v[i] > bits ? a.v[i] : bits;
  float r;
  std::memcpy(&r, &bits, 4);
  return r;
}
template <int Count>
inline I shift_left(I a) {
  BAREFOOT_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << Count);
  return a;
}
// Each byte shifted right by Shift (left if negative), then only the bits of mask.
template <int Shift>
inline Quads field(Quads a, int mask) {
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int byte = static_cast<uint8_t>(a.v[i]);
    const int moved = Shift < 0 ? byte << (Shift < 0 ? -Shift : 0) : byte >> (Shift < 0 ? 0 : Shift);
    a.v[i] = static_cast<int8_t>(moved & mask);
  }
  return a;
}
inline Quads merge(Quads a, Quads b) {
  for (int i = 0; i < 4 * kLanes; ++i) a.v[i] |= b.v[i];
  return a;
}
// Entry code % 16 of a table of 16 bytes, for each byte; codes are below 128.
inline Quads shuffle(const uint8_t* table, Quads code) {
#if defined(__ARM_NEON) && defined(__aarch64__)
  for (int h = 0; h < 2; ++h) {
    const uint8x16_t index = vandq_u8(vreinterpretq_u8_s8(vld1q_s8(code.v + 16 * h)), vdupq_n_u8(15));
    vst1q_s8(code.v + 16 * h, vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(table), index)));
  }
#else
  for (int i = 0; i < 4 * kLanes; ++i) code.v[i] = static_cast<int8_t>(table[code.v[i] & 15]);
#endif
  return code;
}
template <int Bit>
inline Quads where_bit(Quads code, Quads yes, Quads no) {
  for (int i = 0; i < 4 * kLanes; ++i) no.v[i] = code.v[i] >> Bit & 1 ? yes.v[i] : no.v[i];
  return no;
}
inline Quads where_equal(Quads code, int value, Quads yes, Quads no) {
  for (int i = 0; i < 4 * kLanes; ++i) no.v[i] = code.v[i] == value ? yes.v[i] : no.v[i];
  return no;
}
inline Quads flip_signs(Quads a) {  // unsigned bytes to signed ones 128 below
  for (int i = 0; i < 4 * kLanes; ++i) a.v[i] = static_cast<int8_t>(a.v[i] ^ -128);
  return a;
}
template <bool Wide>
inline I dot_quads(I sum, Quads w, Quads x) {
#if defined(__ARM_FEATURE_DOTPROD)
  for (int h = 0; h < 2; ++h)
    vst1q_s32(sum.v + 4 * h, vdotq_s32(vld1q_s32(sum.v + 4 * h), vld1q_s8(w.v + 16 * h), vld1q_s8(x.v + 16 * h)));
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * x.v[4 * i + j];
#endif
  return sum;
}

// --- pairs of 16 bits ---

inline Quads keep_pairs(Quads a, int mask) {
  for (int i = 0; i < 4 * kLanes; ++i) a.v[i] = static_cast<int8_t>(a.v[i] & mask >> 8 * (i % 2));
  return a;
}
// Each shifted right by Count, left if negative.
template <int Count>
inline Quads shift_pairs(Quads a) {
  uint16_t pairs[2 * kLanes];
  std::memcpy(pairs, a.v, sizeof pairs);
  for (uint16_t& each : pairs) each = static_cast<uint16_t>(Count < 0 ? each << (Count < 0 ? -Count : 0) : each >> (Count < 0 ? 0 : Count));
  std::memcpy(a.v, pairs, sizeof pairs);
  return a;
}
// sum + products of both numbers of each pair, signed.
inline I dot_pairs(I sum, Quads a, Quads b) {
  int16_t x[2 * kLanes], y[2 * kLanes];
  std::memcpy(x, a.v, sizeof x);
  std::memcpy(y, b.v, sizeof y);
  BAREFOOT_EACH sum.v[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
// The low halves of a and b, in turn.
inline void store_pairs(int16_t* p, F a, F b) {
  uint32_t even[kLanes], odd[kLanes];
  std::memcpy(even, a.v, sizeof even);
  std::memcpy(odd, b.v, sizeof odd);
  for (int i = 0; i < kLanes; ++i) {
    p[2 * i] = static_cast<int16_t>(even[i]);
    p[2 * i + 1] = static_cast<int16_t>(odd[i]);
  }
}

// --- codes ---

struct Codes {
  uint8_t v[32];
};
inline Codes nibbles(const uint8_t* p) {
  Codes r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = p[i] & 15;
    r.v[16 + i] = p[i] >> 4;
  }
  return r;
}
inline Codes pairs(const uint8_t* p) {
  Codes r;
  for (int k = 0; k < 4; ++k)
    for (int j = 0; j < 8; ++j) r.v[8 * k + j] = p[j] >> (2 * k) & 3;
  return r;
}
inline Codes bits(const uint8_t* p, int value) {
  Codes r;
  for (int i = 0; i < 32; ++i) r.v[i] = static_cast<uint8_t>((p[i / 8] >> (i % 8) & 1) * value);
  return r;
}
inline Codes field(const uint8_t* p, int shift, int mask) {
  Codes r;
  for (int i = 0; i < 32; ++i) r.v[i] = static_cast<uint8_t>(p[i] >> shift & mask);
  return r;
}
inline Codes raise(Codes a, int shift) {
  for (int i = 0; i < 32; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] << shift);
  return a;
}
inline Codes operator|(Codes a, Codes b) {
  for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
  return a;
}
inline Codes plain_bytes(const uint8_t* p, int flip) {  // flip: 0, or 0x80 to turn signed into unsigned and back
  Codes r;
  for (int i = 0; i < 32; ++i) r.v[i] = static_cast<uint8_t>(p[i] ^ flip);
  return r;
}
inline void store(uint8_t* p, Codes a) { std::memcpy(p, a.v, 32); }

// --- weighted sums of rows of 32 signed codes, two rows at a time, in 32 integers ---

struct Woven {
  int16_t v[32][2];
};
struct Sums32 {
  int32_t v[32];
};
inline Woven weave(Codes a, Codes b) {
  Woven r;
  for (int i = 0; i < 32; ++i) {
    r.v[i][0] = static_cast<int8_t>(a.v[i]);
    r.v[i][1] = static_cast<int8_t>(b.v[i]);
  }
  return r;
}
inline Sums32 zero_sums() { return Sums32{}; }
inline void add_rows(Sums32& sum, const Woven& rows, const int16_t* weights) {  // of the two rows
  for (int i = 0; i < 32; ++i) sum.v[i] += rows.v[i][0] * weights[0] + rows.v[i][1] * weights[1];
}
inline void add_scaled(float* to, const Sums32& sum, float scale, float offset) {  // to += scale * sum + offset
  for (int i = 0; i < 32; ++i) to[i] += static_cast<float>(sum.v[i]) * scale + offset;
}

struct Lanes8 {
  float v[8];
};
struct Sums8 {
  int32_t v[8];
};
template <bool Wide>
inline Sums8 dot_codes(Codes w, const int8_t* x) {
  Sums8 r{};
#if defined(__ARM_FEATURE_DOTPROD)
  for (int h = 0; h < 2; ++h)
    vst1q_s32(r.v + 4 * h, vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vld1q_u8(w.v + 16 * h)), vld1q_s8(x + 16 * h)));
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 4; ++j) r.v[i] += static_cast<int8_t>(w.v[4 * i + j]) * x[4 * i + j];
#endif
  return r;
}
inline Lanes8 zero_lanes() { return Lanes8{}; }
inline Lanes8 accumulate(Lanes8 sum, Sums8 a, float low, float high) {
  for (int i = 0; i < 4; ++i) sum.v[i] += static_cast<float>(a.v[i]) * low;
  for (int i = 4; i < 8; ++i) sum.v[i] += static_cast<float>(a.v[i]) * high;
  return sum;
}
inline Lanes8 accumulate(Lanes8 sum, Sums8 a, float scale) { return accumulate(sum, a, scale, scale); }
inline float reduce_add(Lanes8 a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

#undef BAREFOOT_EACH
