// com.glmcompile::EmbeddingW8, rows of a packed int8 matrix by token id, as float32.
#pragma once

#include <cstdint>

#include "ort_abi.h"

namespace glmcompile {

class EmbeddingW8 {
 public:
  static constexpr const char* kName = "EmbeddingW8";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"ids", Type::kInt64},           // [...], each in [0, vocabulary)
      {"weight", Type::kInt8},         // [V16, K64, 16 k4, 16 n, 4 k], as LinearW8A8's
      {"weight_scale", Type::kFloat},  // [V]
  };
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};  // [..., hidden]

  explicit EmbeddingW8(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  std::int64_t hidden_size_;
  std::int64_t vocab_size_;
};

}  // namespace glmcompile
