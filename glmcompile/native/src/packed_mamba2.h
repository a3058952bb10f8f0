// com.glmcompile::PackedMamba2: the selective state space layer of Mamba-2 over a packed batch of
// sequences, each of which continues where its last call ended.
//
//   dt <- clamp(softplus(dt + dt_bias));  h <- exp(dt A) h + dt x B^T;  output = h C + D x
//
// As transformers' mamba2_chunk_scan. Its mamba2_selective_state_update does not clamp dt, so that
// there a prompt and a generated token differ; here they do not. A is what both are given, -exp of
// the checkpoint's A_log. Heads of one group follow each other.
//
// With A [heads, state_size] and heads of one channel this is Mamba's scan (selective_scan_fn).
#pragma once

#include "ort_abi.h"
#include "recurrent_kernels.h"

namespace glmcompile {

class PackedMamba2 {
 public:
  static constexpr const char* kName = "PackedMamba2";
  static constexpr const char* kDomain = "com.glmcompile";
  enum Input { kX, kDt, kA, kB, kC, kD, kDtBias, kState, kSlots, kCumulative, kPast };
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},   // [tokens, heads * head_size]
      {"dt", Type::kFloat},  // [tokens, heads]
      {"A", Type::kFloat},   // [heads] or [heads, state_size], negative
      {"B", Type::kFloat},   // [tokens, groups * state_size]
      {"C", Type::kFloat},   // [tokens, groups * state_size]
      {"D", Type::kFloat, true},                     // [heads]
      {"dt_bias", Type::kFloat, true},               // [heads]
      {"state", Type::kFloat},                       // [slots, heads, head_size, state_size]
      {"state_slots", Type::kInt32},                 // [sequences], see packed_sequences.h
      {"cumulative_sequence_length", Type::kInt32},  // [sequences + 1]
      {"past_seqlens", Type::kInt32},                // [sequences]
  };
  static constexpr Port kOutputs[] = {
      {"output", Type::kFloat},           // [tokens, heads * head_size]
      {"state_out", Type::kFloat, true},  // state, updated
  };
  static constexpr Alias kAliases[] = {{kState, 1}};

  explicit PackedMamba2(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  bool dt_softplus_;
  float dt_min_, dt_max_;  // attributes time_step_min and time_step_max, 0 and infinity by default
  const RecurrentKernels* kernels_;
};

}  // namespace glmcompile
