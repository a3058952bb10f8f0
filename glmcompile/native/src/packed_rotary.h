// com.glmcompile::PackedRotary: rotary position embedding on packed query, key and value.
//
// The first `num_heads` heads of each row (queries and keys) are rotated as ONNX's RotaryEmbedding
// (version 23) does, the other channels (values) pass through. One node instead of a split, two
// rotations and the reshapes between them; its output is PagedAttention's packed query.
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
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};  // [tokens, width]

  explicit PackedRotary(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  std::int64_t num_heads_;
  std::int64_t head_size_;
  std::int64_t rotary_dim_;
  bool interleaved_;
};

}  // namespace glmcompile
