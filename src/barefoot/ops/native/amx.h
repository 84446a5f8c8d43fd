// Tile registers (AMX-BF16): eight matrices of 16 rows of 64 bytes. Included only where BAREFOOT_AMX is defined.
//
// The instructions are spelled out, as gcc 12's intrinsics name neither the memory they read nor all of the shapes, and
// the compiler may drop the stores before them. Arithmetic ignores MXCSR: it rounds to the nearest even, and denormals
// count as zero on the way in and out.
#pragma once

constexpr int kTileSide = 16;                      // rows of a tile, and float32 in one
constexpr int kTileDepth = 32;                     // bfloat16 in a row of a tile
constexpr int64_t kTileBytes = kTileSide * 64;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// All eight tiles at full size in this thread, until the end of the scope.
class Tiles {
 public:
  Tiles() {
    static constexpr TileShapes full;
    asm volatile("ldtilecfg %0" ::"m"(full));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int To>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(To));
}
template <int To>
inline void load_tile(const void* rows, int64_t stride_bytes = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(To) : "memory");
}
template <int From>
inline void store_tile(void* rows, int64_t stride_bytes = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(From) : "memory");
}
// C[m][n] += sum over k < 16 of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]; A and B bfloat16, C float32.
template <int C, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// --- bfloat16 ---

// Lanes of `low` and `high` in turn, each rounded to the nearest even: what a row of B takes.
inline __m512i interleave_bfloat16(F low, F high) {
  static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}
