// com.glmcompile::VarlenAttention: non-causal attention inside each packed segment.
//
// query: [tokens, num_heads * head_size]; key: [tokens, kv_num_heads * head_size]; value: [tokens,
// kv_num_heads * v_head_size]; output: [tokens, num_heads * v_head_size].
//
// Attribute compute_type is the least precision that the two products may be computed with:
// "float32" (default) or "int8", which rounds keys and values of a segment to int8 with a scale per
// channel. Where integers are not faster, float32 is used.
#pragma once

#include "attention_kernels.h"
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
  float scale_;  // 0 = 1 / sqrt(head_size)
  const AttentionKernels* kernels_;
};

}  // namespace glmcompile
