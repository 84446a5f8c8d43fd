/* The kernel that look-up tables replace: 2-bit codes unpacked to float32 in registers and multiplied-added, AVX2.
   Rows of int2_g{64,128}_asym blocks: f16 scale, f16 minimum, then 8 bytes for 32 codes, bits 2k.. of byte j = element
   8k + j. sum_x holds the sum of x of each group. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static float half_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  return _cvtsh_ss(half);
}

void multiply(const uint8_t* block, long rows, long n_groups, int group, const float* x, const float* sum_x, float* out) {
  const __m256i three = _mm256_set1_epi32(3);
  for (long r = 0; r < rows; ++r) {
    __m256 total = _mm256_setzero_ps();
    float rest = 0;
    for (long g = 0; g < n_groups; ++g, block += 4 + group / 4) {
      const float* xg = x + g * group;
      __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
      for (int c = 0; c < group / 32; ++c, xg += 32) {
        const __m256i packed = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(block + 4 + 8 * c)));
        for (int k = 0; k < 4; ++k) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi32(packed, 2 * k), three);
          sum[k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), _mm256_loadu_ps(xg + 8 * k), sum[k]);
        }
      }
      const __m256 all = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
      total = _mm256_fmadd_ps(all, _mm256_set1_ps(half_at(block)), total);
      rest += half_at(block + 2) * sum_x[g];
    }
    float each[8];
    _mm256_storeu_ps(each, total);
    out[r] = rest + ((each[0] + each[1]) + (each[2] + each[3])) + ((each[4] + each[5]) + (each[6] + each[7]));
  }
}
