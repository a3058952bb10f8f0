#include "varlen_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace glmcompile {

VarlenAttention::VarlenAttention(const KernelInfo& info)
    : num_heads_(info.required<int64_t>("num_heads")),
      kv_num_heads_(info.attribute<int64_t>("kv_num_heads", num_heads_)),
      scale_(info.attribute<float>("scale", 0.0f)) {
  check(num_heads_ > 0 && kv_num_heads_ > 0 && num_heads_ % kv_num_heads_ == 0,
        "attribute num_heads: ", num_heads_, " is not a positive multiple of kv_num_heads ",
        kv_num_heads_);
}

void VarlenAttention::compute(KernelContext& context) const {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  const Tensor offsets = context.input(3);
  check(query.rank() == 2 && query.dim(1) % num_heads_ == 0, "query: expected [tokens, ",
        num_heads_, " * head_size], got ", query.shape_text());
  const int64_t tokens = query.dim(0), head_size = query.dim(1) / num_heads_;
  for (const Tensor* t : {&key, &value})
    check(t->rank() == 2 && t->dim(0) == tokens && t->dim(1) == kv_num_heads_ * head_size,
          t->name(), ": expected [", tokens, ", ", kv_num_heads_ * head_size, "], got ",
          t->shape_text());
  check(offsets.rank() == 1 && offsets.dim(0) >= 1, "cu_seqlens: expected [segments + 1], got ",
        offsets.shape_text());
  const int32_t* cu = offsets.data<int32_t>();
  const int64_t segments = offsets.dim(0) - 1;
  check(cu[0] == 0, "cu_seqlens: must start with 0, got ", cu[0]);
  for (int64_t i = 0; i < segments; ++i)
    check(cu[i] <= cu[i + 1], "cu_seqlens: decreases from ", cu[i], " to ", cu[i + 1]);
  check(cu[segments] == tokens, "cu_seqlens: must end with the number of tokens ", tokens,
        ", got ", cu[segments]);

  float* out = context.output(0, query.shape(), 2).data<float>();
  const float *q = query.data<float>(), *k = key.data<float>(), *v = value.data<float>();
  const float scale = scale_ > 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(head_size));
  const int64_t group = num_heads_ / kv_num_heads_;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t begin = cu[s], length = cu[s + 1] - cu[s];
    context.parallel_for(length * num_heads_, [&](size_t task) {
      const int64_t row = begin + task / num_heads_, head = task % num_heads_;
      const float* q_row = q + (row * num_heads_ + head) * head_size;
      std::vector<float> scores(length);
      float top = -INFINITY;
      for (int64_t j = 0; j < length; ++j) {
        const float* k_row = k + ((begin + j) * kv_num_heads_ + head / group) * head_size;
        float dot = 0;
        for (int64_t d = 0; d < head_size; ++d) dot += q_row[d] * k_row[d];
        top = std::max(top, scores[j] = dot * scale);
      }
      float sum = 0;
      for (float& score : scores) sum += score = std::exp(score - top);
      float* o_row = out + (row * num_heads_ + head) * head_size;
      std::fill(o_row, o_row + head_size, 0.0f);
      for (int64_t j = 0; j < length; ++j) {
        const float* v_row = v + ((begin + j) * kv_num_heads_ + head / group) * head_size;
        for (int64_t d = 0; d < head_size; ++d) o_row[d] += scores[j] / sum * v_row[d];
      }
    });
  }
}

}  // namespace glmcompile
