// com.glmcompile::PackedCausalConv: a depthwise causal convolution of a packed batch of sequences,
// each of which continues where its last call ended.
//
//   output[t, c] = activation(bias[c] + sum over j of weight[c, j] * x[t - kernel + 1 + j, c])
//
// As ONNX's CausalConvWithState, and transformers' causal_conv1d_fn and causal_conv1d_update, whose
// state has one token more than is ever read.
#pragma once

#include "ort_abi.h"
#include "recurrent_kernels.h"

namespace glmcompile {

class PackedCausalConv {
 public:
  static constexpr const char* kName = "PackedCausalConv";
  static constexpr const char* kDomain = "com.glmcompile";
  enum Input { kX, kWeight, kBias, kState, kSlots, kCumulative, kPast };
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},           // [tokens, channels]
      {"weight", Type::kFloat},      // [channels, kernel], that of the oldest token first
      {"bias", Type::kFloat, true},  // [channels]
      {"state", Type::kFloat},       // [slots, channels, kernel - 1], oldest token first
      {"state_slots", Type::kInt32},                 // [sequences], see packed_sequences.h
      {"cumulative_sequence_length", Type::kInt32},  // [sequences + 1]
      {"past_seqlens", Type::kInt32},                // [sequences]
  };
  static constexpr Port kOutputs[] = {
      {"output", Type::kFloat},           // [tokens, channels]
      {"state_out", Type::kFloat, true},  // state, updated
  };
  static constexpr Alias kAliases[] = {{kState, 1}};

  explicit PackedCausalConv(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  bool silu_;
  const RecurrentKernels* kernels_;
};

}  // namespace glmcompile
