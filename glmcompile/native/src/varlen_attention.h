// com.glmcompile::VarlenAttention: non-causal attention inside each packed segment.
#pragma once

#include "ort_abi.h"

namespace glmcompile {

class VarlenAttention {
 public:
  static constexpr const char* kName = "VarlenAttention";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"query", Type::kFloat},
      {"key", Type::kFloat},
      {"value", Type::kFloat},
      {"cu_seqlens", Type::kInt32},
  };
  static constexpr Port kOutputs[] = {{"output", Type::kFloat}};

  explicit VarlenAttention(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  int64_t num_heads_;
  int64_t kv_num_heads_;
  float scale_;
};

}  // namespace glmcompile
