// The weight formats of blocks.py, one struct each. A block of `elements` weights in `bytes` bytes unpacks into codes,
// 32 at a time, and one scale (and offset) per `group` weights: w = scale * (code - zero) + offset.
//
// Names, sizes and layouts are described in blocks.py, and a test compares the two.
#pragma once

template <class T>
inline T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline float half_at(const uint8_t* p) { return half_to_float(read<uint16_t>(p)); }
// A scale of ScaleBytes bytes: an f16 number, or the exponent of a power of two.
template <int ScaleBytes>
inline float read_scale(const uint8_t* p) {
  if constexpr (ScaleBytes == 2) return half_at(p);
  const uint32_t bits = static_cast<uint32_t>(*p) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// --- dense: one weight a block ---

struct F32 {
  static constexpr char name[] = "f32";
  static constexpr int elements = 1, bytes = 4;
  static void to_float(const uint8_t* p, int64_t n, float* out) { std::memcpy(out, p, n * sizeof(float)); }
};
struct F16 {
  static constexpr char name[] = "f16";
  static constexpr int elements = 1, bytes = 2;
  static void to_float(const uint8_t* p, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load_half(p + 2 * i));
    for (; i < n; ++i) out[i] = half_at(p + 2 * i);
  }
};
struct BF16 {
  static constexpr char name[] = "bf16";
  static constexpr int elements = 1, bytes = 2;
  static void to_float(const uint8_t* p, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t word = static_cast<uint32_t>(read<uint16_t>(p + 2 * i)) << 16;
      std::memcpy(out + i, &word, 4);
    }
  }
};
struct Zero {  // a matrix without blocks, of which only parts are stored
  static constexpr char name[] = "zero";
  static constexpr int elements = 1, bytes = 0;
  static void to_float(const uint8_t*, int64_t n, float* out) { std::memset(out, 0, n * sizeof(float)); }
};

// --- quantized ---

struct Quantized {
  static constexpr int elements = 32, group = 32, zero = 0;
  static constexpr int code_bits = 0;        // of formats that have panels
  static constexpr int scale_at = 0;         // byte of a block where its f16 numbers begin
  static constexpr int scale_bytes = 2;      // of each of these numbers; 0: there are none
  static constexpr int sub_bytes = 0;        // of sub-scales, as superblocks.py and bilevel.py describe them
  static constexpr bool wide = false;        // codes of 8 bits
  static constexpr bool has_offset = false;
  static constexpr bool in_float = false;    // products are taken in float32
  using Levels = Codes8;                     // of the codes in panels
};
// 8-bit codes are signed or unsigned as the multiplier wants them: `zero` moves by 128.
struct Signed8 : Quantized {
  static constexpr bool wide = true;
  static constexpr int zero = kUnsignedBytes ? 128 : 0, flip = kUnsignedBytes ? 0x80 : 0;
};

struct Q4_0 : Quantized {
  static constexpr char name[] = "q4_0";
  static constexpr int bytes = 18, code_bits = 4, zero = 8;
  static Codes codes(const uint8_t* b, int) { return nibbles(b + 2); }
  static void scales(const uint8_t* b, float* scale, float*) { scale[0] = half_at(b); }
};
struct Q4_1 : Quantized {
  static constexpr char name[] = "q4_1";
  static constexpr int bytes = 20, code_bits = 4;
  static constexpr bool has_offset = true;
  static Codes codes(const uint8_t* b, int) { return nibbles(b + 4); }
  static void scales(const uint8_t* b, float* scale, float* offset) {
    scale[0] = half_at(b);
    offset[0] = half_at(b + 2);
  }
};
struct Q5_0 : Quantized {
  static constexpr char name[] = "q5_0";
  static constexpr int bytes = 22, code_bits = 5, zero = 16;
  static Codes codes(const uint8_t* b, int) { return nibbles(b + 6) | bits(b + 2, 16); }
  static void scales(const uint8_t* b, float* scale, float*) { scale[0] = half_at(b); }
};
struct Q5_1 : Quantized {
  static constexpr char name[] = "q5_1";
  static constexpr int bytes = 24, code_bits = 5;
  static constexpr bool has_offset = true;
  static Codes codes(const uint8_t* b, int) { return nibbles(b + 8) | bits(b + 4, 16); }
  static void scales(const uint8_t* b, float* scale, float* offset) { Q4_1::scales(b, scale, offset); }
};
struct Q8_0 : Signed8 {
  static constexpr char name[] = "q8_0";
  static constexpr int bytes = 34, code_bits = 8;
  static Codes codes(const uint8_t* b, int) { return plain_bytes(b + 2, flip); }
  static void scales(const uint8_t* b, float* scale, float*) { scale[0] = half_at(b); }
};

// Super-blocks of 256. `sub_scales` copies the sub-scales of a block in the order that panels have: sixteen bytes, or
// sixteen numbers of 6 bits in twelve. Those of a panel are numbers less `sub_zero`.
struct K : Quantized {
  static constexpr int elements = 256, sub_zero = 0;
};

inline void split_halves(const uint8_t* packed, uint32_t* low, uint32_t* high) {
  const uint32_t a = read<uint32_t>(packed);
  *low = a & 0x0f0f0f0fu;
  *high = a >> 4 & 0x0f0f0f0fu;
}

struct Q2_K : K {
  static constexpr char name[] = "q2_k";
  static constexpr int bytes = 84, group = 16, code_bits = 2, scale_at = 80, sub_bytes = 16;
  static constexpr bool has_offset = true;
  static void sub_scales(const uint8_t* b, uint8_t* to) { std::memcpy(to, b, 16); }
  static Codes codes(const uint8_t* b, int c) { return field(b + 16 + 32 * (c / 4), 2 * (c % 4), 3); }
  static void scales(const uint8_t* b, float* scale, float* offset) {
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int i = 0; i < 16; ++i) {
      scale[i] = d * static_cast<float>(b[i] & 15);
      offset[i] = -(dmin * static_cast<float>(b[i] >> 4));
    }
  }
};
struct Q3_K : K {
  static constexpr char name[] = "q3_k";
  static constexpr int bytes = 110, group = 16, zero = 4, code_bits = 3, scale_at = 108, sub_bytes = 12, sub_zero = 32;
  static void sub_scales(const uint8_t* b, uint8_t* to) { std::memcpy(to, b + 96, 12); }
  static Codes codes(const uint8_t* b, int c) {
    return field(b + 32 + 32 * (c / 4), 2 * (c % 4), 3) | raise(field(b, c, 1), 2);
  }
  static void scales(const uint8_t* b, float* scale, float*) {
    const uint32_t high = read<uint32_t>(b + 104);
    uint32_t six[4];
    split_halves(b + 96, &six[0], &six[2]);
    split_halves(b + 100, &six[1], &six[3]);
    for (int i = 0; i < 4; ++i) six[i] |= (high >> (2 * i) & 0x03030303u) << 4;
    const float d = half_at(b + 108);
    uint8_t each[16];
    std::memcpy(each, six, 16);
    for (int i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(each[i] - 32);
  }
};
struct SixBitPairs : K {  // eight scales, then eight minimums
  static constexpr int sub_bytes = 12;
  static constexpr bool has_offset = true;
  static void unpack(const uint8_t* b, uint32_t* six) {
    const uint32_t first = read<uint32_t>(b + 4), second = read<uint32_t>(b + 8), third = read<uint32_t>(b + 12);
    six[0] = first & 0x3f3f3f3fu;
    six[1] = (third & 0x0f0f0f0fu) | (first >> 2 & 0x30303030u);
    six[2] = second & 0x3f3f3f3fu;
    six[3] = (third >> 4 & 0x0f0f0f0fu) | (second >> 2 & 0x30303030u);
  }
  static void scales(const uint8_t* b, float* scale, float* offset) {
    const float d = half_at(b), dmin = half_at(b + 2);
    uint32_t six[4];
    unpack(b, six);
    uint8_t each[16];
    std::memcpy(each, six, 16);
    for (int i = 0; i < 8; ++i) {
      scale[i] = d * static_cast<float>(each[i]);
      offset[i] = -(dmin * static_cast<float>(each[8 + i]));
    }
  }
  static void sub_scales(const uint8_t* b, uint8_t* to) {
    uint32_t six[4], packed[3] = {};
    unpack(b, six);
    for (int i = 0; i < 4; ++i) {
      packed[i % 2] |= (six[i] & 0x0f0f0f0fu) << (4 * (i / 2));
      packed[2] |= (six[i] >> 4 & 0x03030303u) << (2 * i);
    }
    std::memcpy(to, packed, 12);
  }
};
struct Q4_K : SixBitPairs {
  static constexpr char name[] = "q4_k";
  static constexpr int bytes = 144, code_bits = 4;
  static Codes codes(const uint8_t* b, int c) { return field(b + 16 + 32 * (c / 2), 4 * (c % 2), 15); }
};
struct Q5_K : SixBitPairs {
  static constexpr char name[] = "q5_k";
  static constexpr int bytes = 176, code_bits = 5;
  static Codes codes(const uint8_t* b, int c) {
    return field(b + 48 + 32 * (c / 2), 4 * (c % 2), 15) | raise(field(b + 16, c, 1), 4);
  }
};
struct Q6_K : K {
  static constexpr char name[] = "q6_k";
  static constexpr int bytes = 210, group = 16, zero = 32, code_bits = 6, scale_at = 208, sub_bytes = 16;
  static void sub_scales(const uint8_t* b, uint8_t* to) { std::memcpy(to, b + 192, 16); }
  static Codes codes(const uint8_t* b, int c) {
    const int half = c / 4, j = c % 4;
    return field(b + 64 * half + 32 * (j % 2), 4 * (j / 2), 15) | raise(field(b + 128 + 32 * half, 2 * j, 3), 4);
  }
  static void scales(const uint8_t* b, float* scale, float*) {
    const float d = half_at(b + 208);
    for (int i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(static_cast<int8_t>(b[192 + i]));
  }
};

// Ternary super-blocks: one scale, codes 0..2.
struct TQ2_0 : Quantized {
  static constexpr char name[] = "tq2_0";
  static constexpr int elements = 256, bytes = 66, zero = 1, code_bits = 2, scale_at = 64;
  static Codes codes(const uint8_t* b, int c) { return field(b + 32 * (c / 4), 2 * (c % 4), 3); }
  static void scales(const uint8_t* b, float* scale, float*) {
    for (int i = 0; i < 8; ++i) scale[i] = half_at(b + scale_at);
  }
};
struct TQ1_0 : Quantized {
  static constexpr char name[] = "tq1_0";
  static constexpr int elements = 256, bytes = 54, zero = 1;
  static Codes codes(const uint8_t* b, int c) {
    uint8_t code[32];
    if (c < 5) digits(b, 32, c, code);
    else {
      for (int i = 0; i < 2; ++i) {  // sixteen codes: of bytes 32-47, the last ones of bytes 48-51
        if (2 * c + i < 15) digits(b + 32, 16, 2 * c + i - 10, code + 16 * i);
        else
          for (int k = 0; k < 4; ++k) digits(b + 48, 4, k, code + 16 * i + 4 * k);
      }
    }
    return plain_bytes(code, 0);
  }
  static void scales(const uint8_t* b, float* scale, float*) {
    for (int i = 0; i < 8; ++i) scale[i] = half_at(b + 52);
  }

 private:
  // Digit k after the point of n numbers in base 3.
  static void digits(const uint8_t* p, int n, int k, uint8_t* code) {
    constexpr int power[] = {1, 3, 9, 27, 81};
    for (int i = 0; i < n; ++i) code[i] = static_cast<uint8_t>((p[i] * power[k] & 255) * 3 >> 8);
  }
};

// Own groups. The scale of a group of 64 or 128 counts for each of its chunks of 32.
struct GroupName {
  char text[20] = {};
};
// A digit in place of each '#', then the group.
constexpr GroupName group_name(const char* pattern, int group, const char* last = "", int first = 0, int second = 0) {
  GroupName name;
  int n = 0;
  const auto add = [&](const char* s) {
    for (; *s; ++s) {
      name.text[n++] = *s == '#' ? static_cast<char>('0' + first) : *s;
      if (*s == '#') first = second;
    }
  };
  add(pattern);
  add(group == 32 ? "_g32" : group == 64 ? "_g64" : "_g128");
  add(last);
  return name;
}

// 32 codes of Bits bits, as payload.py describes them.
template <int Bits>
inline Codes unpack_codes(const uint8_t* chunk) {
  if constexpr (Bits == 8) return plain_bytes(chunk, 0);
  else if constexpr (Bits == 7) return nibbles(chunk) | raise(unpack_codes<3>(chunk + 16), 4);
  else if constexpr (Bits == 6) return nibbles(chunk) | raise(pairs(chunk + 16), 4);
  else if constexpr (Bits == 5) return nibbles(chunk + 4) | bits(chunk, 16);
  else if constexpr (Bits == 4) return nibbles(chunk);
  else if constexpr (Bits == 3) return pairs(chunk) | bits(chunk + 8, 4);
  else if constexpr (Bits == 1) return bits(chunk, 1);
  else return pairs(chunk);
}

template <int Bits, int Group, bool Symmetric, int ScaleBytes = 2>
struct Integer : Quantized {
  static constexpr GroupName full_name = group_name("int#", Group, Symmetric ? "_sym" : "_asym", Bits);
  static constexpr const char* name = full_name.text;
  static constexpr int elements = Group, code_bits = Bits, scale_bytes = ScaleBytes;
  static constexpr int header = ScaleBytes * (Symmetric ? 1 : 2);
  static constexpr int bytes = header + Group * Bits / 8;
  static constexpr bool wide = Bits == 8, has_offset = !Symmetric;
  static constexpr int flip = wide && !kUnsignedBytes ? 0x80 : 0;
  static constexpr int zero = (Symmetric ? 1 << (Bits - 1) : 0) - flip;
  static Codes codes(const uint8_t* b, int c) {
    const uint8_t* chunk = b + header + 4 * Bits * c;
    if constexpr (Bits == 8) return plain_bytes(chunk, flip);
    else return unpack_codes<Bits>(chunk);
  }
  static void scales(const uint8_t* b, float* scale, float* offset) {
    for (int i = 0; i < Group / 32; ++i) {
      scale[i] = read_scale<ScaleBytes>(b);
      if constexpr (!Symmetric) offset[i] = half_at(b + 2);
    }
  }
};

// -1, 0 and 1 as codes 0, 1 and 2.
template <int Group>
struct Ternary : Integer<2, Group, true> {
  static constexpr const char* name = Group == 32 ? "ternary_g32" : Group == 64 ? "ternary_g64" : "ternary_g128";
  static constexpr int zero = 1;
};

// Groups of 16 whose scales and zero points have few bits too. Arithmetic is exact.
template <int Bits>
struct Bilevel : Quantized {
  static constexpr char name[] = {'b', 'i', 'l', 'e', 'v', 'e', 'l', static_cast<char>('0' + Bits), '\0'};
  static constexpr int elements = 64, group = 16, code_bits = Bits, scale_bytes = 0, sub_bytes = 5;
  static constexpr int bytes = sub_bytes + 8 * Bits;
  static constexpr bool has_offset = true;
  static constexpr float zero_unit = static_cast<float>(1 << Bits) / 64;
  static float step(uint8_t code) { return half_to_float(static_cast<uint16_t>(code << 7)) * (1.0f / 256); }
  static void sub_scales(const uint8_t* b, uint8_t* to) { std::memcpy(to, b, sub_bytes); }
  static Codes codes(const uint8_t* b, int c) { return unpack_codes<Bits>(b + sub_bytes + 4 * Bits * c); }
  static void scales(const uint8_t* b, float* scale, float* offset) {
    const float d = step(b[0]);
    for (int i = 0; i < elements / group; ++i) {
      scale[i] = d * static_cast<float>(b[1 + i] & 15);
      offset[i] = -(scale[i] * (zero_unit * static_cast<float>(8 + 3 * (b[1 + i] >> 4))));
    }
  }
};

// Block floating point: the scale is a power of two, of which only the exponent is stored.
template <int Bits, int Group>
struct BlockFloat : Integer<Bits, Group, true, 1> {
  static constexpr GroupName full_name = group_name("bfp#", Group, "", Bits);
  static constexpr const char* name = full_name.text;
};

// Codes that index a table of integers.
template <class Table, int Group>
struct Looked : Quantized {
  using Levels = Table;
  static constexpr GroupName full_name = group_name(Table::name, Group, "", Table::first_digit, Table::second_digit);
  static constexpr const char* name = full_name.text;
  static constexpr int elements = Group, code_bits = Table::bits, bytes = 2 + Group * code_bits / 8, zero = Table::zero;
  static constexpr bool wide = Table::wide;
  static Codes stored(const uint8_t* b, int c) { return unpack_codes<code_bits>(b + 2 + 4 * code_bits * c); }
  static Codes codes(const uint8_t* b, int c) {
    uint8_t code[32];
    store(code, stored(b, c));
    for (uint8_t& each : code) each = static_cast<uint8_t>(Table::level(b, each) + zero);
    return plain_bytes(code, 0);
  }
  static void scales(const uint8_t* b, float* scale, float*) {
    for (int i = 0; i < Group / 32; ++i) scale[i] = half_at(b);
  }
};

// Minifloats whose levels are no small integers: products in float32.
template <int Exponent, int Mantissa, int Group>
struct WideFloat : Quantized {
  static constexpr GroupName full_name = group_name("e#m#", Group, "", Exponent, Mantissa);
  static constexpr const char* name = full_name.text;
  static constexpr bool in_float = true;
  static constexpr int bits = 1 + Exponent + Mantissa, elements = Group, bytes = 2 + Group * bits / 8;
  struct Table {
    float of[1 << bits] = {};
  };
  static constexpr Table levels() {  // the largest magnitude lies between 1 and 2
    Table table;
    constexpr int half = 1 << (bits - 1), ones = 1 << Mantissa, top = (1 << Exponent) - 1;
    for (int code = 0; code < half; ++code) {
      const int exponent = code >> Mantissa, mantissa = code & (ones - 1);
      float level = static_cast<float>(exponent ? ones + mantissa : mantissa) / ones;
      for (int e = exponent ? exponent : 1; e < top; ++e) level /= 2;
      table.of[code] = level;
      table.of[half + code] = -level;
    }
    return table;
  }
  static constexpr Table table = levels();
  static void to_float(const uint8_t* b, float* out) {
    const float scale = half_at(b);
    for (int c = 0; c < Group / 32; ++c) {
      uint8_t code[32];
      store(code, unpack_codes<bits>(b + 2 + 4 * bits * c));
      for (int i = 0; i < 32; ++i) *out++ = scale * table.of[code[i]];
    }
  }
};

template <class... Format>
struct FormatList {
  static constexpr int size = sizeof...(Format);
};
template <class... A, class... B>
FormatList<A..., B...> operator+(FormatList<A...>, FormatList<B...>);
template <template <int> class Format>
using InGroups = FormatList<Format<32>, Format<64>, Format<128>>;
template <int Exponent, int Mantissa>
struct Wide {
  template <int Group>
  using In = WideFloat<Exponent, Mantissa, Group>;
};
template <class Table>
struct Look {
  template <int Group>
  using In = Looked<Table, Group>;
};
template <int Bits>
struct Shifted {
  template <int Group>
  using In = BlockFloat<Bits, Group>;
};
template <class... Family>
using Families = decltype((InGroups<Family::template In>{} + ...));

using Plain =
    FormatList<F32, F16, BF16, Zero, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, TQ2_0,
               TQ1_0,  //
               Integer<8, 32, true>, Integer<8, 32, false>, Integer<8, 64, true>, Integer<8, 64, false>,
               Integer<8, 128, true>, Integer<8, 128, false>,  //
               Integer<4, 32, true>, Integer<4, 32, false>, Integer<4, 64, true>, Integer<4, 64, false>,
               Integer<4, 128, true>, Integer<4, 128, false>,  //
               Integer<3, 32, true>, Integer<3, 32, false>, Integer<3, 64, true>, Integer<3, 64, false>,
               Integer<3, 128, true>, Integer<3, 128, false>,  //
               Integer<2, 32, true>, Integer<2, 32, false>, Integer<2, 64, true>, Integer<2, 64, false>,
               Integer<2, 128, true>, Integer<2, 128, false>,  //
               Integer<1, 32, false>, Integer<1, 64, false>, Integer<1, 128, false>,  //
               Ternary<32>, Ternary<64>, Ternary<128>>;
template <int Exponent, int Mantissa>
using Small = Look<Indexed<Minifloat<Exponent, Mantissa>>>;
using NonUniform = Families<Look<Indexed<Nf4>>,                                                //
                            Small<2, 0>, Small<2, 1>, Small<3, 0>, Small<2, 2>, Wide<3, 1>,    //
                            Small<2, 3>, Wide<3, 2>, Wide<4, 1>,                               //
                            Wide<2, 4>, Wide<3, 3>, Wide<4, 2>, Wide<5, 1>,                    //
                            Wide<2, 5>, Wide<3, 4>, Wide<4, 3>, Wide<5, 2>, Wide<6, 1>,        //
                            Look<Bitmod<3, 3, 6>>, Look<Bitmod<4, 10, 16>>,                    //
                            Shifted<8>, Shifted<6>, Shifted<4>, Shifted<3>>;
using TwoLevel = FormatList<Bilevel<2>, Bilevel<3>, Bilevel<4>>;
using Formats = decltype(Plain{} + NonUniform{} + TwoLevel{});

// --- what the kernels use ---

template <class Format>
constexpr bool is_dense = Format::elements == 1;
template <class Format>
constexpr bool is_in_float() {
  if constexpr (is_dense<Format>) return true;
  else return Format::in_float;
}
template <class Format>
constexpr bool in_float = is_in_float<Format>();
template <class Format>
constexpr bool panels_exist() {
  if constexpr (is_dense<Format>) return false;
  else return Format::code_bits != 0;
}
template <class Format>
constexpr bool has_panels = panels_exist<Format>();
template <class Format>
constexpr bool lut_exists() {
  if constexpr (has_panels<Format>)  // one f16 scale, before codes that stand for themselves
    return Format::code_bits <= 4 && Format::scale_at == 0 && Format::scale_bytes == 2 && Format::sub_bytes == 0 &&
           !Format::Levels::indexed;
  else return false;
}
template <class Format>
constexpr bool has_lut = lut_exists<Format>();

// 32 codes as they are stored.
template <class Format>
inline Codes stored_codes(const uint8_t* block, int c) {
  if constexpr (Format::Levels::indexed) return Format::stored(block, c);
  else return Format::codes(block, c);
}

// Scales and offsets of one block with the zero point folded in: w = scale * code + offset.
template <class Format>
inline void folded_scales(const uint8_t* block, float* scale, float* offset) {
  Format::scales(block, scale, offset);
  for (int i = 0; i < Format::elements / Format::group; ++i) {
    if constexpr (!Format::has_offset) offset[i] = 0.0f - scale[i] * static_cast<float>(Format::zero);
    else if constexpr (Format::zero != 0) offset[i] -= scale[i] * static_cast<float>(Format::zero);
  }
}

// n weights of a row from column k0 on, in float32, rounded exactly as blocks.decode does; k0 and n are whole blocks.
template <class Format>
inline void dequantize_row(const uint8_t* data, int64_t n_cols, int64_t row, int64_t k0, int64_t n, float* out) {
  const uint8_t* block = data + (row * n_cols + k0) / Format::elements * Format::bytes;
  if constexpr (is_dense<Format>) {
    Format::to_float(block, n, out);
  } else if constexpr (in_float<Format>) {
    for (; n > 0; n -= Format::elements, block += Format::bytes, out += Format::elements) Format::to_float(block, out);
  } else {
    float scale[Format::elements / Format::group], offset[Format::elements / Format::group];
    for (; n > 0; n -= Format::elements, block += Format::bytes) {
      Format::scales(block, scale, offset);
      for (int c = 0; c < Format::elements / 32; ++c, out += 32) {
        constexpr int run = Format::group < 32 ? Format::group : 32;  // columns of one scale: vectors, without a gather
        uint8_t code[32];
        store(code, Format::codes(block, c));
        for (int first = 0; first < 32; first += run) {
          const int g = (32 * c + first) / Format::group;
          const float times = scale[g], plus = Format::has_offset ? offset[g] : 0.0f;
          for (int i = first; i < first + run; ++i) {
            const int whole = Format::wide && !kUnsignedBytes ? static_cast<int8_t>(code[i]) : code[i];
            const float product = times * static_cast<float>(whole - Format::zero);
            if constexpr (Format::has_offset) out[i] = product + plus;
            else out[i] = product;
          }
        }
      }
    }
  }
}
