// com.glmcompile::VarlenAttention: attention inside each packed segment.
//
// query: [tokens, num_heads * head_size]; key: [key tokens, kv_num_heads * head_size]; value: [key
// tokens, kv_num_heads * v_head_size]; output: [tokens, num_heads * v_head_size]. Segment i has
// queries [cu_seqlens[i], cu_seqlens[i + 1]) and keys [cu_seqlens_k[i], cu_seqlens_k[i + 1]); those
// of cu_seqlens where cu_seqlens_k is left out. A query without keys gives 0.
//
// Attribute is_causal (default 0) lets query i of a segment see keys up to i + keys - queries: the
// last query sees all of them. Attribute softcap (default 0: none) bounds scores to softcap *
// tanh(score / softcap). Attribute compute_type is the least precision that the two products may be
// computed with: "float32" (default) or "int8", which rounds keys and values of a segment to int8
// with a scale per channel. Where integers are not faster, float32 is used.
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
      {"cu_seqlens_k", Type::kInt32, true},
  };
  static constexpr Port kOutputs[] = {{"output", Type::kFloat}};

  explicit VarlenAttention(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  HeadSizes read_heads(const Tensor& query, const Tensor& key, const Tensor& value,
                       bool keys_apart) const;

  int64_t num_heads_;
  int64_t kv_num_heads_;
  float scale_;    // 0 = 1 / sqrt(head_size)
  float softcap_;  // 0 = none
  bool is_causal_;
  const AttentionKernels* kernels_;
};

}  // namespace glmcompile
