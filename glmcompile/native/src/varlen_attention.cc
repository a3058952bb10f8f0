#include "varlen_attention.h"

#include <cmath>

#include "attention_driver.h"
#include "scratch_buffer.h"

namespace glmcompile {
namespace {

Precision precision_of(const std::string& compute_type) {
  if (compute_type == "float32") return Precision::kFloat32;
  if (compute_type == "int8") return Precision::kInt8;
  fail("attribute compute_type: expected float32 or int8, got ", compute_type);
}

// Points the problem at int8 copies of its keys and values, with scales per segment and channel:
// a segment's result then does not depend on the others, nor a channel's on larger ones.
void quantize_rows(const KernelContext& context, const AttentionKernels& kernels,
                   AttentionProblem* problem) {
  const int64_t width = problem->token_stride, head_size = problem->head_size;
  const int64_t segments = static_cast<int64_t>(problem->segments.size());
  const size_t tokens = segments == 0 ? 0
                                      : static_cast<size_t>(problem->segments.back().first_key +
                                                            problem->segments.back().keys);
  static thread_local ScratchBuffer element_buffer, scale_buffer;
  int8_t* elements = reinterpret_cast<int8_t*>(element_buffer.reserve(2 * tokens * width));
  float* scales = reinterpret_cast<float*>(
      scale_buffer.reserve(2 * static_cast<size_t>(segments) * width * sizeof(float)));
  int8_t* const out[] = {elements, elements + tokens * width};
  float* const scale[] = {scales, scales + segments * width};
  const void* const in[] = {problem->keys, problem->values};
  const int64_t heads = problem->kv_num_heads;
  context.parallel_for(static_cast<size_t>(2 * segments * heads), [&](size_t i) {
    const int64_t side = static_cast<int64_t>(i) % 2, head = static_cast<int64_t>(i) / 2 % heads;
    const int64_t index = static_cast<int64_t>(i) / 2 / heads;
    const Segment& segment = problem->segments[index];
    const int64_t at = segment.first_key * width + head * head_size;
    kernels.quantize(static_cast<const float*>(in[side]) + at, width, segment.keys,
                     problem->head_size, side == 0, out[side] + at,
                     scale[side] + index * width + head * head_size);
  });
  problem->element = Element::kInt8;
  problem->keys = out[0];
  problem->values = out[1];
  for (int64_t i = 0; i < segments; ++i) {
    problem->segments[i].key_scale = scale[0] + i * width;
    problem->segments[i].value_scale = scale[1] + i * width;
  }
}

}  // namespace

VarlenAttention::VarlenAttention(const KernelInfo& info)
    : num_heads_(info.required<int64_t>("num_heads")),
      kv_num_heads_(info.attribute<int64_t>("kv_num_heads", num_heads_)),
      scale_(info.attribute<float>("scale", 0.0f)),
      kernels_(&attention_kernels(
          selected_isa(), Element::kFloat,
          precision_of(info.attribute<std::string>("compute_type", "float32")))) {
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
  check(head_size > 0 && head_size % 8 == 0 && head_size <= kMaxHeadSize,
        "query: head_size ", head_size, " is not a multiple of 8 up to ", kMaxHeadSize);
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

  AttentionProblem problem{};
  for (int64_t i = 0; i < segments; ++i)
    problem.segments.push_back({cu[i], cu[i + 1] - cu[i], 0, cu[i + 1] - cu[i], cu[i]});
  problem.num_heads = static_cast<int>(num_heads_);
  problem.kv_num_heads = static_cast<int>(kv_num_heads_);
  problem.head_size = static_cast<int>(head_size);
  problem.scale = scale_ != 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(head_size));
  problem.query = query.data<float>();
  problem.query_stride = num_heads_ * head_size;
  problem.output = context.output(0, query.shape(), 2).data<float>();
  problem.keys = key.data<float>();
  problem.values = value.data<float>();
  problem.token_stride = kv_num_heads_ * head_size;
  if (kernels_->quantize != nullptr) quantize_rows(context, *kernels_, &problem);
  run_attention(context, *kernels_, problem);
}

}  // namespace glmcompile
