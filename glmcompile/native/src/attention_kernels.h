// The tile kernels of attention: one table of functions for each instruction set and precision.
//
// Keys are cut into tiles of kKeyTile at absolute positions of their sequence. Each tile's softmax
// is computed relative to the tile's own maximum, then tiles are folded in ascending order. The
// arithmetic for one query therefore never depends on which other queries, chunks, sequences or
// threads took part: prefill in one call, chunked prefill and decode agree bit for bit.
//
// Scores live in the base-2 domain: packing multiplies queries by scale * log2(e).
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace glmcompile {

inline constexpr int kKeyTile = 128;
inline constexpr int kMaxHeadSize = 512;
inline constexpr int kHeadPadding = 32;  // packed rows and partial outputs are padded to this
inline constexpr int kKeyPadding = 32;   // pack_tile reads key rows in steps up to this
inline constexpr int kFewRows = 4;       // rows for which packing a tile does not pay
inline constexpr int kRowBlock = 48;     // query rows that share one score buffer

constexpr bool valid_head_size(std::int64_t size) {
  return size > 0 && size % 8 == 0 && size <= kMaxHeadSize;
}

constexpr int padded_head(int head_size) {
  return (head_size + kHeadPadding - 1) / kHeadPadding * kHeadPadding;
}

enum class Element { kFloat, kInt8 };

// How queries, keys, probabilities and values are represented in the two products.
enum class Precision {
  kFloat32,
  kInt8,  // integers: int8 keys and values, with exact int32 sums
};

// Channels of a head: values may have another number than queries and keys.
struct HeadSizes {
  int key, value;  // multiples of 8
};

// A packed tile of keys and values, in the layout of the table that packed it.
struct PackedTile {
  void* keys;             // kKeyTile * padded_head(key) * packed_size bytes
  void* values;           // kKeyTile * padded_head(value) * packed_size bytes
  std::int32_t* key_sum;  // [kKeyTile]; integers only
};

// Where keys and values of one tile are: pointers to a head's elements, of zeros beyond the last key
// and on unmapped pages.
struct TileRows {
  const void* keys[kKeyTile];
  const void* values[kKeyTile];
  int padded = 0;  // the number of keys, in whole kKeyPadding
  bool unmapped;
};

struct PackedQueries {
  void* rows;    // rows * padded_head(key) * 4 bytes
  float* scale;  // [rows]; integers only
};

// Running state of rows over the tiles folded so far; starts as -inf, 0, 0.
struct SoftmaxState {
  float* max;     // [rows], read in whole vectors
  float* sum;     // [rows]
  float* output;  // [rows, padded_head(value)]
};

struct AttendTile {
  PackedQueries queries;  // at the first row
  int rows;  // at most kRowBlock
  HeadSizes head;
  PackedTile tile;
  const int* begin;   // [rows] first and
  const int* end;     // [rows] past-the-last key of the tile each row attends; begin < end for one
  const float* bias;  // [kKeyTile] 0 or -inf (unmapped page), or null
  float softcap;      // in the base-2 domain; 0 = none
  // [rows] ALiBi: after the cap, slope * (distance + key of the tile) is added, in the base-2 domain;
  // distance is the position of the tile's first key minus the query's. Null slope = none.
  const float* slope;
  const float* distance;
  float* scratch;     // [kRowBlock, kKeyTile] float
  SoftmaxState part;  // of kRowBlock rows, for results that still have to be folded
  SoftmaxState state;
};

struct AttentionKernels {
  int packed_size;         // bytes of a packed key's or value's channel
  int unpacked_head_size;  // largest head that attend_unpacked pays for; 0 = there is none
  // rows: `count` pointers to head_size floats, written padded_head apart;
  // channel_scale: [head_size] multipliers.
  void (*pack_queries)(const float* const* rows, int count, int head_size,
                       const float* channel_scale, PackedQueries packed);
  // Prefetches the rows `ahead`, which are needed next.
  void (*pack_tile)(const TileRows& rows, const TileRows& ahead, HeadSizes head,
                    PackedTile packed);
  // Folds a packed tile into the state of its rows.
  void (*attend)(const AttendTile& task);
  // The same result straight from pack_tile's arguments, for decode: at most kFewRows rows.
  void (*attend_unpacked)(const AttendTile& task, const TileRows& rows, const TileRows& ahead);
  // Folds tiles that were attended apart, each from a state of its own; outputs are `width` wide.
  void (*fold)(int rows, int width, SoftmaxState tile, SoftmaxState state);
  // Rounds float keys or values of one head of a segment, `count` rows `stride` apart in both
  // arrays, to int8 with one scale per channel; centered, after moving each channel's range
  // around 0, which is right for keys: it adds the same to all scores of a query. The other
  // functions then take the int8 rows. Null where they take the elements as they are.
  void (*quantize)(const float* rows, std::int64_t stride, std::int64_t count, int head_size,
                   bool centered, std::int8_t* out, float* scale);
};

// The fastest table for cached elements of this type that is at least as accurate as `precision`.
const AttentionKernels& attention_kernels(Isa isa, Element element, Precision precision);

// Tables of each translation unit; only attention_kernels may name them.
const AttentionKernels& attention_float_portable(Element element);
const AttentionKernels& attention_float_avx2(Element element);
const AttentionKernels& attention_float_avx512(Element element);
const AttentionKernels& attention_int8_avx512(Element element);

}  // namespace glmcompile
