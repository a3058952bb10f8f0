// com.glmcompile::PackedGatedDeltaRule: linear attention with a decaying state over a packed batch
// of sequences, each of which continues where its last call ended.
//
//   S <- diag(exp(decay)) S;  S <- S + k (beta (v - S^T k))^T;  output = scale S^T q
//
// As transformers' torch_recurrent_gated_delta_rule, and recurrent_kimi_delta_attention where the
// decay is of each channel of the key. Without beta, S <- S + k v^T: ONNX's LinearAttention calls
// this "gated", and it is MiniMax's lightning attention. A query and key head serves
// v_heads / k_heads value heads in a row.
#pragma once

#include "ort_abi.h"
#include "recurrent_kernels.h"

namespace glmcompile {

class PackedGatedDeltaRule {
 public:
  static constexpr const char* kName = "PackedGatedDeltaRule";
  static constexpr const char* kDomain = "com.glmcompile";
  enum Input { kQuery, kKey, kValue, kDecay, kBeta, kState, kSlots, kCumulative, kPast };
  static constexpr Port kInputs[] = {
      {"query", Type::kFloat},  // [tokens, k_heads * k_size]
      {"key", Type::kFloat},    // [tokens, k_heads * k_size]
      {"value", Type::kFloat},  // [tokens, v_heads * v_size]
      {"decay", Type::kFloat},  // [tokens, v_heads] or [tokens, v_heads * k_size], logarithms
      {"beta", Type::kFloat, true},                  // [tokens, v_heads]
      {"state", Type::kFloat},                       // [slots, v_heads, k_size, v_size]
      {"state_slots", Type::kInt32},                 // [sequences], see packed_sequences.h
      {"cumulative_sequence_length", Type::kInt32},  // [sequences + 1]
      {"past_seqlens", Type::kInt32},                // [sequences]
  };
  static constexpr Port kOutputs[] = {
      {"output", Type::kFloat},           // [tokens, v_heads * v_size]
      {"state_out", Type::kFloat, true},  // state, updated
  };
  static constexpr Alias kAliases[] = {{kState, 1}};

  explicit PackedGatedDeltaRule(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  int64_t k_heads_, v_heads_;
  float scale_;           // 0: 1 / sqrt(k_size)
  float l2norm_epsilon_;  // 0: queries and keys are used as they are
  const RecurrentKernels* kernels_;
};

}  // namespace glmcompile
