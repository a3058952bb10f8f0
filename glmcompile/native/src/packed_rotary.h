// com.glmcompile::PackedRotary: rotary position embedding on packed query, key and value.
//
// Each row of x holds num_heads queries, kv_num_heads keys and as many values. Queries and keys are
// rotated as ONNX's RotaryEmbedding (version 23) does, values pass through. One node instead of a
// split, two rotations and the reshapes between them. With one output that is PagedAttention's
// packed query; with three, queries, keys and values apart.
#pragma once

#include "ort_abi.h"

namespace glmcompile {

class PackedRotary {
 public:
  static constexpr const char* kName = "PackedRotary";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},    // [..., width], `tokens` rows
      {"cos", Type::kFloat},  // [..., tokens, rotary_dim / 2]
      {"sin", Type::kFloat},
  };
  static constexpr Port kOutputs[] = {
      {"query", Type::kFloat},        // [tokens, num_heads * head_size], or all of the width
      {"key", Type::kFloat, true},    // [tokens, kv_num_heads * head_size]
      {"value", Type::kFloat, true},  // [tokens, kv_num_heads * head_size]
  };

  explicit PackedRotary(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  std::int64_t num_heads_;
  std::int64_t kv_num_heads_;
  std::int64_t head_size_;
  std::int64_t rotary_dim_;
  bool interleaved_;
};

}  // namespace glmcompile
