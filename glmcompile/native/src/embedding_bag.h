// com.glmcompile::EmbeddingBag, weighted sums of a table's rows, as torch's embedding_bag.
#pragma once

#include "ort_abi.h"

namespace glmcompile {

class EmbeddingBag {
 public:
  static constexpr const char* kName = "EmbeddingBag";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"table", Type::kFloat},    // [rows, width]
      {"indices", Type::kInt64},  // [bags, size], each in [0, rows)
      {"weights", Type::kFloat},  // [bags, size]
  };
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};  // [bags, width]

  explicit EmbeddingBag(const KernelInfo&) {}
  void compute(KernelContext& context) const;
};

}  // namespace glmcompile
