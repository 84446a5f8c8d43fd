// All kernels for one instruction set. Compiled once per set: BAREFOOT_ISA names the set's namespace and BAREFOOT_VEC
// the header with its vectors. Everything but the table has internal linkage, so that no code for a newer processor can
// be picked by the linker for an older one.
#include "kernels.h"

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "pool.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define BAREFOOT_UNROLL
#else
#define BAREFOOT_UNROLL _Pragma("GCC unroll 8")
#endif

namespace barefoot::BAREFOOT_ISA {
namespace {

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

#include BAREFOOT_VEC
// In this order: each uses the ones before it.
#if defined(BAREFOOT_AMX)
#include "amx.h"
#endif
//
#include "levels.h"
//
#include "formats.h"
//
#include "int8_matmul.h"
//
#include "float_matmul.h"
//
#include "panels.h"
//
#include "super_panels.h"
//
#include "lut.h"
//
#include "tiles.h"
//
#include "matmul.h"
//
#include "planes.h"
//
#include "csr.h"
//
#include "lowrank.h"
//
#include "signs.h"
//
#include "fused.h"
//
#include "select.h"
//
#include "groups.h"
//
#include "feedback.h"
//
#include "kvrows.h"
//
#include "attention.h"
//
#if defined(BAREFOOT_AMX)
#include "attention_bf16.h"
#endif
//
#include "attention_token.h"
//
#include "attention_blocks.h"
#include "attention_channels.h"
//
#include "attention_segment.h"
//
#include "flash.h"

// The kinds of parts.
constexpr std::array kParts{kCsr,
                            PartKernel{"signs", &sign_part_flaw, &sign_part_scratch, &sign_part_matmul},
                            thin_kernel<F32>("lowrank_f32"),
                            thin_kernel<F16>("lowrank_f16"),
                            thin_kernel<BF16>("lowrank_bf16")};

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    All::info, Formats::size, &matmul, &matmul_scratch, &embed,     &pack_panels,       &pack_lut,
    &rmsnorm,
    &rope,     &glu,          &add,    &argmax,         &lowest_before, &kv_append, &attention,         &attention_scratch,
    &attend_segment, &segment_scratch, &attention_mass, &kv_write,
    &plane_matmul, &plane_scratch, &plane_bytes, &top_k, &sign_matmul, &sign_scratch, &sign_bytes,
    &fit_groups, &group_errors, &round_groups, &encode_groups, &feedback_round,
    &flash_forward, &flash_backward, &flash_scratch,
    kParts.data(), kParts.size(),
};

}  // namespace barefoot::BAREFOOT_ISA
