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
void quantize_rows(const KernelContext& context, const AttentionKernels& kernels, int64_t tokens,
                   AttentionProblem* problem) {
  const size_t heads = problem->kv_num_heads, segments = problem->segments.size();
  const size_t key_width = heads * problem->head.key, value_width = heads * problem->head.value;
  static thread_local ScratchBuffer element_buffer, scale_buffer;
  struct Side {
    const float* rows;
    int head_size;
    size_t width;
    int8_t* elements;
    float* scales;
  };
  Side keys{static_cast<const float*>(problem->keys), problem->head.key, key_width,
            reinterpret_cast<int8_t*>(element_buffer.reserve(tokens * (key_width + value_width))),
            reinterpret_cast<float*>(
                scale_buffer.reserve(segments * (key_width + value_width) * sizeof(float)))};
  Side values{static_cast<const float*>(problem->values), problem->head.value, value_width,
              keys.elements + tokens * key_width, keys.scales + segments * key_width};
  context.parallel_for(2 * segments * heads, [&](size_t i) {
    const Side& side = i % 2 == 0 ? keys : values;
    const size_t head = i / 2 % heads, index = i / 2 / heads, channel = head * side.head_size;
    const Segment& segment = problem->segments[index];
    const size_t at = segment.first_key * side.width + channel;
    kernels.quantize(side.rows + at, side.width, segment.keys, side.head_size, i % 2 == 0,
                     side.elements + at, side.scales + index * side.width + channel);
  });
  problem->element = Element::kInt8;
  problem->keys = keys.elements;
  problem->values = values.elements;
  for (size_t i = 0; i < segments; ++i) {
    problem->segments[i].key_scale = keys.scales + i * key_width;
    problem->segments[i].value_scale = values.scales + i * value_width;
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
  check(valid_head_size(head_size), "query: head_size ", head_size,
        " is not a multiple of 8 up to ", kMaxHeadSize);
  check(key.rank() == 2 && key.dim(0) == tokens && key.dim(1) == kv_num_heads_ * head_size,
        "key: expected [", tokens, ", ", kv_num_heads_ * head_size, "], got ", key.shape_text());
  check(value.rank() == 2 && value.dim(0) == tokens && value.dim(1) % kv_num_heads_ == 0,
        "value: expected [", tokens, ", ", kv_num_heads_, " * v_head_size], got ",
        value.shape_text());
  const int64_t value_head_size = value.dim(1) / kv_num_heads_;
  check(valid_head_size(value_head_size), "value: v_head_size ", value_head_size,
        " is not a multiple of 8 up to ", kMaxHeadSize);
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
  problem.head = {static_cast<int>(head_size), static_cast<int>(value_head_size)};
  problem.scale = scale_ != 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(head_size));
  problem.query = query.data<float>();
  problem.query_stride = num_heads_ * head_size;
  const int64_t output_shape[] = {tokens, num_heads_ * value_head_size};
  problem.output = context.output(0, output_shape, 2).data<float>();
  problem.keys = key.data<float>();
  problem.values = value.data<float>();
  if (kernels_->quantize != nullptr) quantize_rows(context, *kernels_, tokens, &problem);
  run_attention(context, *kernels_, problem);
}

}  // namespace glmcompile
