// What the codes of a format stand for: themselves, or the levels of levels.py, looked up by byte shuffles.
#pragma once

// Byte i of the result is entry `code[i]` of a table of 2^Bits bytes (16 at least); codes are below 2^Bits.
template <int Bits>
inline Quads look_up(const uint8_t* table, Quads code) {
  if constexpr (Bits <= 4) return shuffle(table, code);
  else {
    constexpr int half = Bits - 1;
    return where_bit<half>(code, look_up<half>(table + (1 << half), code), look_up<half>(table, code));
  }
}

// The codes themselves.
struct Codes8 {
  static constexpr bool indexed = false;
  static Codes8 of(const uint8_t*, int) { return {}; }
  Quads operator()(Quads code) const { return code; }
};

// Levels in integers, `Source::level(code)`. They are multiplied with `zero` added, a power of two that makes them
// unsigned; where that takes more than seven bits they are as 8-bit codes are.
template <class Source>
struct Indexed {
  static constexpr bool indexed = true;
  static constexpr const char* name = Source::name;
  static constexpr int first_digit = Source::first_digit, second_digit = Source::second_digit;
  static constexpr int bits = Source::bits, n_codes = 1 << bits;

  static constexpr int end(int sign) {  // the farthest level on one side of zero
    int most = 0;
    for (int code = 0; code < n_codes; ++code) {
      const int reach = sign * Source::level(code);
      most = reach > most ? reach : most;
    }
    return most;
  }
  static constexpr int unsigned_zero() {
    int power = 1;
    while (power < end(-1)) power *= 2;
    return power;
  }
  static constexpr bool wide = unsigned_zero() + end(1) > 127;
  static constexpr int zero = !wide ? unsigned_zero() : kUnsignedBytes ? 128 : 0;

  static constexpr int n_bytes = n_codes < 16 ? 16 : n_codes;
  struct Bytes {
    uint8_t of[n_bytes] = {};
  };
  static constexpr Bytes shifted() {
    Bytes table;
    for (int i = 0; i < n_bytes; ++i) table.of[i] = static_cast<uint8_t>(Source::level(i % n_codes) + zero);
    return table;
  }
  static constexpr Bytes table = shifted();

  // Of the rows from `row` on in a panel's group.
  static Indexed of(const uint8_t*, int) { return {}; }
  Quads operator()(Quads code) const { return look_up<bits>(table.of, code); }
  // Of one row, whose f16 scale lies at `scale`.
  static int level(const uint8_t*, int code) { return Source::level(code); }
};

struct Nf4 {
  static constexpr const char* name = "nf4";
  static constexpr int bits = 4, first_digit = 0, second_digit = 0;
  static constexpr int level(int code) {
    constexpr int8_t levels[] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
    return levels[code];
  }
};

// In units of the smallest magnitude. A code is sign, exponent and mantissa.
template <int Exponent, int Mantissa>
struct Minifloat {
  static constexpr const char* name = "e#m#";
  static constexpr int bits = 1 + Exponent + Mantissa, first_digit = Exponent, second_digit = Mantissa;
  static constexpr int level(int code) {
    const int exponent = code >> Mantissa & ((1 << Exponent) - 1), mantissa = code & ((1 << Mantissa) - 1);
    // Without a mantissa nothing but zero is below the smallest power of two.
    const int one = 1 << Mantissa, magnitude = exponent == 0 ? mantissa : (one + mantissa) << (exponent - 1);
    return code >> (Exponent + Mantissa) ? -magnitude : magnitude;
  }
};

// A minifloat whose negative zero is one of two special levels, chosen by the last bit of a row's scale.
template <int Bits, int Inside, int Beyond>
struct BitmodSource : Minifloat<2, Bits - 3> {
  static constexpr const char* name = "bitmod#";
  static constexpr int first_digit = Bits, special = 1 << (Bits - 1);  // the latter its code
  static constexpr int level(int code) { return code == special ? Beyond : Minifloat<2, Bits - 3>::level(code); }
};
template <int Bits, int Inside, int Beyond>
struct Bitmod : Indexed<BitmodSource<Bits, Inside, Beyond>> {
  using Base = Indexed<BitmodSource<Bits, Inside, Beyond>>;
  Quads special;

  static Bitmod of(const uint8_t* group, int row) {
    uint16_t scales[kLanes];
    uint32_t bytes[kLanes];  // the special level four times
    std::memcpy(scales, group + 2 * row, sizeof scales);
    constexpr uint32_t each = 0x01010101u, inside = (Inside + Base::zero) * each, more = (Beyond - Inside) * each;
    for (int i = 0; i < kLanes; ++i) bytes[i] = inside + (scales[i] & 1u) * more;
    uint8_t repeated[sizeof bytes];
    std::memcpy(repeated, bytes, sizeof bytes);
    return {{}, load_quads(repeated)};
  }
  Quads operator()(Quads code) const {
    return where_equal(code, BitmodSource<Bits, Inside, Beyond>::special, special, Base::operator()(code));
  }
  static int level(const uint8_t* scale, int code) {
    const bool is_special = code == BitmodSource<Bits, Inside, Beyond>::special;
    return is_special && !(scale[0] & 1) ? Inside : Base::level(scale, code);
  }
};
