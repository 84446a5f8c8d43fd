// What a set of compiled kernels offers. kernels.cpp is compiled once per instruction set and fills one table each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace barefoot {

// Regions of the scratch arrays; the same numbers stand in scratch.py, which states the closed forms.
constexpr int64_t kAlign = 64;
constexpr int64_t kColumnBlock = 1024;
constexpr int64_t kRowTile = 32;
constexpr int64_t kFloatRowTile = 8;
constexpr int64_t kKeyTile = 64;
constexpr int64_t kQueryTile = 96;
constexpr int64_t kBfloat16Queries = 32;
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kGroup = 32;  // activations that share a scale
constexpr int64_t kBlockRun = 32;  // positions, or channels, of blocks whose codes lie together
constexpr int64_t kPanelRows = 16;
constexpr int64_t kLutRows = 64;
constexpr int64_t kPlaneRows = 16;
constexpr int64_t kFewLutTokens = 8;  // up to here products are looked up; beyond, codes are unpacked into tiles
constexpr int64_t kBfloat16Tokens = 24;    // from here on products are taken in bfloat16 where the processor has tiles
constexpr int64_t kBfloat16Columns = 256;  // whose bfloat16 weights are held at a time
constexpr int64_t kBfloat16Block = 128;    // tokens whose sums are held at a time

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct FormatInfo {
  const char* name;
  int64_t block_elements;
  int64_t block_bytes;
  bool has_panels, has_lut;
  int64_t row_bytes(int64_t n_cols) const { return n_cols / block_elements * block_bytes; }
};

enum class Layout { rows, panels, lut };

struct Weight {
  int format;  // index into Kernels::formats
  Layout layout;
  int64_t rows;
  const uint8_t* data;
  float* out;  // [n_tokens, rows]
};

struct MatmulArgs {
  const float* x;  // [n_tokens, n_cols]
  int64_t n_tokens, n_cols;
  const Weight* weights;
  int n_weights;
  bool int8, add;
  uint8_t* scratch;
  int n_threads;
};

struct PlaneArgs {
  const float* x;  // [n_tokens, n_cols]
  int64_t n_tokens, n_cols;
  const uint8_t* weight;
  int64_t n_rows, group;  // group: a multiple of 32 columns, at most kMostPlaneColumns
  int weight_bits, activation_bits;  // 1 to 8
  float zero;  // the code that stands for 0 where no minimum is added
  bool has_minimum, add;
  float* out;  // [n_tokens, n_rows]
  uint8_t* scratch;
  int n_threads;
};
constexpr int64_t kMostPlaneColumns = 32768;  // 2^15 * 255 * 255 < 2^31: products of a group fit int32

// A sum of blocks of signs and low rank, as signs.py describes them.
struct SignArgs {
  const float* x;  // [n_tokens, n_cols]
  int64_t n_tokens, n_cols;
  const uint8_t* const* blocks;
  int64_t n_blocks, n_rows, rank;
  bool int8, add;
  float* out;  // [n_tokens, n_rows]
  uint8_t* scratch;
  int n_threads;
};
constexpr int64_t kSignGroup = 128;  // columns whose products share a scale
constexpr int64_t kMostSignRanks = 64;

// An addend that is not rows of blocks, as parts.py describes them.
struct PartArgs {
  const float* x;  // [n_tokens, n_cols]
  int64_t n_tokens, n_cols, n_rows;
  const uint8_t* data;
  int64_t n_bytes;
  bool add;
  float* out;  // [n_tokens, n_rows]
  uint8_t* scratch;
  int n_threads;
};
struct PartKernel {
  const char* name;
  const char* (*flaw)(const PartArgs&);  // of shape and data alone: what is wrong with them, or null
  int64_t (*scratch)(const PartArgs&);
  void (*matmul)(const PartArgs&);
};

enum class KvFormat { f32, f16, q8, q4, q3, q2, bfp4 };  // in the order of kvrows.FORMATS

// Bytes of n elements of one row, whole groups or the last part of one.
inline int64_t kv_row_bytes(KvFormat format, int64_t n) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  switch (format) {
    case KvFormat::f32: return 4 * n;
    case KvFormat::f16: return 2 * n;
    case KvFormat::q8: return n + 2 * groups;
    case KvFormat::q4: return n / 2 + 4 * groups;
    case KvFormat::q3: return 3 * n / 8 + 4 * groups;
    case KvFormat::q2: return n / 4 + 4 * groups;
    case KvFormat::bfp4: return n / 2 + groups;
  }
  return 0;
}

struct KvShape {
  KvFormat format;
  int64_t n_kv_heads, head_dim, capacity;
  int64_t row_bytes() const { return kv_row_bytes(format, head_dim); }
  int64_t bytes() const { return n_kv_heads * capacity * row_bytes(); }  // of one sequence's keys, or its values
};

// Keys by channel, and values by token or by channel, as kvblocks.py describes them.
inline int64_t code_words(int bits, int64_t n_terms) {  // of 4 bytes, of each lane
  const auto words = [&](int width) { return (n_terms * width + 31) / 32; };
  return bits == 3 ? words(2) + words(1) : words(bits);
}
struct KeyBlocks {
  int bits;
  int64_t group, n_kv_heads, head_dim, n_blocks;
  int64_t run_bytes() const { return kBlockRun * 4 * code_words(bits, head_dim); }
  int64_t block_bytes() const { return 4 * head_dim + group / kBlockRun * run_bytes(); }
};
struct ValueBlocks {
  int bits;
  bool by_channel;
  int64_t group, n_kv_heads, head_dim, n_blocks;  // group: positions of a block; 32 by token
  int64_t run_bytes() const { return head_dim * 4 * code_words(bits, kBlockRun); }  // codes of 32 positions
  int64_t part_bytes(int64_t n_channels) const { return kBlockRun * 4 + n_channels * 4 * code_words(bits, kBlockRun); }
  int64_t block_bytes() const {
    if (by_channel) return 4 * head_dim + group / kBlockRun * run_bytes();
    const int64_t rest = head_dim % kBlockRun;
    return head_dim / kBlockRun * part_bytes(kBlockRun) + (rest ? part_bytes(rest) : 0);
  }
};

struct Spot {  // where a token belongs
  int64_t sequence, position;
};

struct AttentionArgs {
  const float* q;  // [n_tokens, n_heads * head_dim]
  const uint8_t *k, *v;
  KvShape kv;
  float* out;
  int64_t n_heads, n_past, n_tokens, window;
  float scale, softcap;
  bool int8;  // so coarse may the rounding be
  uint8_t* scratch;
  int n_threads;
  const Spot* spots = nullptr;  // of each token, one for a sequence; null: all are of one sequence, from n_past on
};

// One part of a KV store, that attention takes in turn with the others: `counts` entries of each key head. Entry e of
// keys (or values) in rows lies in slot (start + e) % capacity, and in blocks at start + e, with a start that is a
// multiple of 32.
struct SegmentArgs {
  const float* q;  // [n_tokens, n_heads * key_dim]
  int64_t n_tokens, n_heads;
  bool keys_in_blocks, values_in_blocks;
  KvShape key_rows, value_rows;
  KeyBlocks key_blocks;
  ValueBlocks value_blocks;
  const uint8_t *k, *v;
  int64_t key_start, value_start;
  const int32_t* counts;  // [n_kv_heads]
  int64_t n_before;       // entries that precede the first token's own: token t sees n_before + t + 1; -1: all
  const float *bias, *key_scale, *value_scale;  // [n_kv_heads, stride] each, or null
  int64_t stride;
  float* scores;  // [n_heads, n_tokens, stride], or null: scaled, capped and biased; -infinity where a token sees none
  float scale, softcap;
  float *sums, *tops, *totals;  // the state: [n_tokens, n_heads, value_dim], and [n_tokens, n_heads] twice
  uint8_t* scratch;
  int n_threads;
  int64_t n_kv_heads() const { return values_in_blocks ? value_blocks.n_kv_heads : value_rows.n_kv_heads; }
  int64_t key_dim() const { return keys_in_blocks ? key_blocks.head_dim : key_rows.head_dim; }
  int64_t value_dim() const { return values_in_blocks ? value_blocks.head_dim : value_rows.head_dim; }
};

// How much the entries of a segment were attended to, once all segments have been: of each entry and key head the sum
// over tokens and the query heads that share it of exp(score - top) / total; with thresholds, one for a token, the number
// of tokens for which all of these heads stay below.
struct MassArgs {
  const float *scores, *tops, *totals;  // [n_heads, n_tokens, stride], [n_tokens, n_heads] twice
  int64_t n_tokens, n_heads, n_kv_heads, stride;
  const int32_t* counts;    // [n_kv_heads]
  const float* thresholds;  // [n_tokens], or null
  float* mass;              // [n_kv_heads, at least as many as counts], added to
  int64_t mass_stride;      // between its rows
  int n_threads;
};

// Attention within documents of `lengths` tokens, one behind the other; rows behind the last one see nothing.
struct FlashArgs {
  const float *q, *k, *v;  // [n, n_heads, head_dim], and [n, n_kv_heads, head_dim] twice
  const int64_t* lengths;
  int64_t n_documents, n, n_heads, n_kv_heads, head_dim;
  int64_t window;  // 0: all
  float scale, softcap;
  uint8_t* scratch;
  int n_threads;
};
struct FlashGradients {
  const float *out, *lse, *d_out;  // [n, n_heads, head_dim], [n_heads, n], [n, n_heads, head_dim]
  float *dq, *dk, *dv;             // of the shapes of q, k, v
};

enum class RangeRule { range, two_means, ternary };

struct Levels {  // of a grid: w = scale * values[rank], plus a minimum in some (barefoot/ops/grids.py)
  const float *values, *bounds;  // [n], [n - 1]
  const uint8_t* codes;          // [n]: of each rank
  int64_t n;
  bool even, has_minimum;
  int64_t group;  // a multiple of 16
  RangeRule rule;
  int64_t n_params() const { return has_minimum ? 2 : 1; }
};

struct RoundingArgs {
  Levels levels;
  const float* x;  // [n_rows, n_cols], whole groups
  int64_t n_rows, n_cols;
  int64_t n_groups() const { return n_rows * (n_cols / levels.group); }
};

struct RangeSearch {  // barefoot/ops/rounding.py
  const float *shrinks, *steps;
  int64_t n_shrinks, n_steps;
  int n_refits;
};

struct FeedbackArgs {
  Levels levels;
  const float* weights;   // [n_rows, n_cols]
  float* targets;         // [n_rows, n_cols]; errors in the end
  const float* params;    // [n_rows, n_groups, n_params]
  const int32_t* groups;  // [n_cols]
  const float* mixing;    // [n_cols, n_cols], what is above its diagonal
  uint8_t* codes;         // [n_rows, n_cols]
  int64_t n_rows, n_cols, n_groups;
};
constexpr int64_t kMostLevels = 256;
constexpr int64_t kMostEncoded = 256;   // elements of a group whose codes are held at a time
constexpr int64_t kMostFeedback = 512;  // columns whose targets are

enum class Activation { silu, gelu_tanh };

struct Kernels {
  const FormatInfo* formats;
  int n_formats;
  void (*matmul)(const MatmulArgs&);
  int64_t (*matmul_scratch)(const MatmulArgs&);
  void (*embed)(const int32_t* ids, int64_t n, const Weight& weight, int64_t cols, float scale, float* out);
  void (*pack_panels)(int format, const uint8_t* rows, int64_t n_rows, int64_t n_cols, uint8_t* out);
  void (*pack_lut)(int format, const uint8_t* rows, int64_t n_rows, int64_t n_cols, uint8_t* out);
  void (*rmsnorm)(const float* x, const float* weight, float eps, bool plus_one, int64_t n_rows, int64_t n, float* out);
  void (*rope)(float* x, int64_t n_tokens, int64_t n_heads, int64_t head_dim, const float* cos, const float* sin,
               int64_t half, bool interleaved);
  void (*glu)(const float* gate, const float* up, float* out, int64_t n, Activation activation);
  void (*add)(float* x, const float* y, int64_t n);
  int64_t (*argmax)(const float* x, int64_t n);
  int32_t (*lowest_before)(const float* score, const int32_t* position, int64_t n, int32_t end);
  void (*kv_append)(const float* rows, int64_t n_tokens, const KvShape& kv, int64_t start, uint8_t* buffer);
  void (*attention)(const AttentionArgs&);
  int64_t (*attention_scratch)(const AttentionArgs&);
  void (*attend_segment)(const SegmentArgs&);
  int64_t (*segment_scratch)(const SegmentArgs&);
  void (*attention_mass)(const MassArgs&);
  void (*kv_write)(const float* rows, int64_t n_tokens, const KvShape& kv, const int32_t* slots, uint8_t* buffer);
  void (*plane_matmul)(const PlaneArgs&);
  int64_t (*plane_scratch)(const PlaneArgs&);
  int64_t (*plane_bytes)(const PlaneArgs&);
  void (*top_k)(const float* x, int64_t n, int64_t k, float* values, int32_t* ids);
  void (*sign_matmul)(const SignArgs&);
  int64_t (*sign_scratch)(const SignArgs&);
  int64_t (*sign_bytes)(const SignArgs&);
  void (*fit_groups)(const RoundingArgs&, const float* importance, bool importance_of_row, const RangeSearch&,
                     float* params);
  void (*group_errors)(const RoundingArgs&, const float* params, const float* importance, bool importance_of_row,
                       float* errors);
  void (*round_groups)(const RoundingArgs&, const float* params, uint8_t* codes);
  bool (*encode_groups)(const RoundingArgs&, int bits, bool is_signed, uint8_t* out);
  void (*feedback_round)(const FeedbackArgs&);
  void (*flash_forward)(const FlashArgs&, float* out, float* lse);
  void (*flash_backward)(const FlashArgs&, const FlashGradients&);
  int64_t (*flash_scratch)(const FlashArgs&, bool backward);
  const PartKernel* parts;
  int n_parts;
};

}  // namespace barefoot
