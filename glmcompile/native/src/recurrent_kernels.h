// The inner loops of recurrent layers: one table of functions for each instruction set.
//
// Every scan walks its tokens one after the other with the same operations in the same order, so
// that a sequence's result does not depend on how it was cut into chunks, on the other sequences or
// on threads. What chunked algorithms gain by turning the walk into matrix products they lose here:
// their sums depend on where a chunk begins.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace glmcompile {

inline constexpr std::int64_t kLanes = 16;          // of a vector, in every instruction set
inline constexpr std::int64_t kConvChannels = 256;  // whose taps and history lie together
inline constexpr std::int64_t kDeltaColumns = 64;   // of a head's state that stay in the L1 cache

constexpr std::int64_t padded_to_lanes(std::int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// Up to kConvChannels channels of one sequence.
struct ConvRows {
  std::int64_t tokens, channels, kernel;
  const float* x;  // [tokens, channels], rows `stride` apart, as are the output's
  float* output;
  std::int64_t stride;
  const float* history;  // [kernel - 1, kConvChannels], the tokens before, oldest first
  const float* taps;     // [kernel, kConvChannels], that of the oldest token first
  const float* bias;     // [channels], or null
  bool silu;
};

// Some columns of one head's state [k_size, v_size] through the tokens of one sequence.
struct DeltaScan {
  std::int64_t tokens, k_size, v_size;
  std::int64_t columns;      // at most kDeltaColumns
  const float *query, *key;  // [tokens, k_size], rows key_stride apart
  std::int64_t key_stride;
  const float* value;  // [tokens, columns], rows value_stride apart, as are the output's
  float* output;
  std::int64_t value_stride;
  const float* decay;  // [tokens, 1 or k_size], natural logarithms, rows decay_stride apart
  std::int64_t decay_stride;
  bool decay_per_channel;
  const float* beta;  // [tokens], beta_stride apart, or null: values are added as they are
  std::int64_t beta_stride;
  float scale;           // of queries
  float l2norm_epsilon;  // of queries and keys; 0: no normalisation
  float* state;          // at the first column
  bool fresh;            // the state starts from zeros, whatever is there
  float* scratch;        // delta_scratch(k_size) floats
};

constexpr std::int64_t delta_scratch(std::int64_t k_size) {
  return 4 * padded_to_lanes(k_size) + k_size * kDeltaColumns;
}

// Some heads of one sequence, each with a state [head_size, state_size].
struct MambaScan {
  std::int64_t tokens, heads, head_size, state_size;
  const float* x;  // [tokens, heads, head_size], rows x_stride apart, as are the output's
  float* output;
  std::int64_t x_stride;
  const float* dt;  // [tokens, heads], rows dt_stride apart
  std::int64_t dt_stride;
  const float* dt_bias;  // [heads], or null
  bool dt_softplus;
  float dt_min, dt_max;
  const float* a;  // [heads], or [heads, state_size]
  bool a_per_state;
  const float *b, *c;  // [tokens, groups, state_size], rows bc_stride apart
  std::int64_t bc_stride;
  std::int64_t first_head, heads_per_group;  // h's group is (first_head + h) / heads_per_group
  const float* d;  // [heads], or null
  float* state;
  float* scratch;  // mamba_scratch(heads) floats
};

constexpr std::int64_t mamba_scratch(std::int64_t heads) { return 2 * padded_to_lanes(heads); }

struct RecurrentKernels {
  void (*causal_conv)(const ConvRows& task);
  void (*delta_scan)(const DeltaScan& task);
  void (*mamba_scan)(const MambaScan& task);
};

const RecurrentKernels& recurrent_kernels(Isa isa);

// Tables of each translation unit; only recurrent_kernels may name them.
const RecurrentKernels& recurrent_portable();
const RecurrentKernels& recurrent_avx2();
const RecurrentKernels& recurrent_avx512();

}  // namespace glmcompile
