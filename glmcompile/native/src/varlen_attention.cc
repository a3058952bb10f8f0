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
  // Centering shifts the scores of a query alike, which softmax does not see but a cap does.
  const bool centered = problem->softcap == 0;
  context.parallel_for(2 * segments * heads, [&](size_t i) {
    const Side& side = i % 2 == 0 ? keys : values;
    const size_t head = i / 2 % heads, index = i / 2 / heads, channel = head * side.head_size;
    const Segment& segment = problem->segments[index];
    if (segment.keys == 0) return;
    const size_t at = segment.first_key * side.width + channel;
    kernels.quantize(side.rows + at, side.width, segment.keys, side.head_size,
                     centered && i % 2 == 0, side.elements + at,
                     side.scales + index * side.width + channel);
  });
  problem->element = Element::kInt8;
  problem->keys = keys.elements;
  problem->values = values.elements;
  for (size_t i = 0; i < segments; ++i) {
    if (problem->segments[i].keys == 0) continue;  // without keys there is no range to scale
    problem->segments[i].key_scale = keys.scales + i * key_width;
    problem->segments[i].value_scale = values.scales + i * value_width;
  }
}

// Where segments begin in packed rows, and the last one ends.
const int32_t* read_offsets(const Tensor& offsets, int64_t segments, int64_t rows) {
  check(offsets.rank() == 1 && offsets.dim(0) == segments + 1, offsets.name(), ": expected [",
        segments + 1, "], got ", offsets.shape_text());
  const int32_t* cu = offsets.data<int32_t>();
  check(cu[0] == 0, offsets.name(), ": must start with 0, got ", cu[0]);
  for (int64_t i = 0; i < segments; ++i)
    check(cu[i] <= cu[i + 1], offsets.name(), ": decreases from ", cu[i], " to ", cu[i + 1]);
  check(cu[segments] == rows, offsets.name(), ": must end with the number of tokens ", rows,
        ", got ", cu[segments]);
  return cu;
}

}  // namespace

VarlenAttention::VarlenAttention(const KernelInfo& info)
    : num_heads_(info.required<int64_t>("num_heads")),
      kv_num_heads_(info.attribute<int64_t>("kv_num_heads", num_heads_)),
      scale_(info.attribute<float>("scale", 0.0f)),
      softcap_(info.attribute<float>("softcap", 0.0f)),
      is_causal_(info.attribute<int64_t>("is_causal", 0) != 0),
      kernels_(&attention_kernels(
          selected_isa(), Element::kFloat,
          precision_of(info.attribute<std::string>("compute_type", "float32")))) {
  check(num_heads_ > 0 && kv_num_heads_ > 0 && num_heads_ % kv_num_heads_ == 0,
        "attribute num_heads: ", num_heads_, " is not a positive multiple of kv_num_heads ",
        kv_num_heads_);
  check(std::isfinite(softcap_) && softcap_ >= 0,
        "attribute softcap: expected 0 or a positive number, got ", softcap_);
}

HeadSizes VarlenAttention::read_heads(const Tensor& query, const Tensor& key, const Tensor& value,
                                      bool keys_apart) const {
  check(query.rank() == 2 && query.dim(1) % num_heads_ == 0, "query: expected [tokens, ",
        num_heads_, " * head_size], got ", query.shape_text());
  const int64_t head_size = query.dim(1) / num_heads_;
  check(valid_head_size(head_size), "query: head_size ", head_size,
        " is not a multiple of 8 up to ", kMaxHeadSize);
  const int64_t key_width = kv_num_heads_ * head_size;
  if (keys_apart)
    check(key.rank() == 2 && key.dim(1) == key_width, "key: expected [key tokens, ", key_width,
          "], got ", key.shape_text());
  else
    check(key.rank() == 2 && key.dim(0) == query.dim(0) && key.dim(1) == key_width,
          "key: expected [", query.dim(0), ", ", key_width, "], got ", key.shape_text());
  check(value.rank() == 2 && value.dim(0) == key.dim(0) && value.dim(1) % kv_num_heads_ == 0,
        "value: expected [", key.dim(0), ", ", kv_num_heads_, " * v_head_size], got ",
        value.shape_text());
  const int64_t value_head_size = value.dim(1) / kv_num_heads_;
  check(valid_head_size(value_head_size), "value: v_head_size ", value_head_size,
        " is not a multiple of 8 up to ", kMaxHeadSize);
  return {static_cast<int>(head_size), static_cast<int>(value_head_size)};
}

void VarlenAttention::compute(KernelContext& context) const {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  const Tensor offsets = context.input(3), key_offsets = context.input(4);
  const bool keys_apart = static_cast<bool>(key_offsets);
  AttentionProblem problem{};
  problem.head = read_heads(query, key, value, keys_apart);
  check(offsets.rank() == 1 && offsets.dim(0) >= 1, "cu_seqlens: expected [segments + 1], got ",
        offsets.shape_text());
  const int64_t segments = offsets.dim(0) - 1;
  const int32_t* cu = read_offsets(offsets, segments, query.dim(0));
  const int32_t* cu_k = keys_apart ? read_offsets(key_offsets, segments, key.dim(0)) : cu;

  for (int64_t i = 0; i < segments; ++i) {
    const int64_t queries = cu[i + 1] - cu[i], keys = cu_k[i + 1] - cu_k[i];
    if (queries > 0) problem.segments.push_back({cu[i], queries, keys - queries, keys, cu_k[i]});
  }
  problem.num_heads = static_cast<int>(num_heads_);
  problem.kv_num_heads = static_cast<int>(kv_num_heads_);
  problem.scale = scale_ != 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(problem.head.key));
  problem.softcap = softcap_;
  problem.causal = is_causal_;
  problem.query = query.data<float>();
  problem.query_stride = query.dim(1);
  const int64_t output_shape[] = {query.dim(0), num_heads_ * problem.head.value};
  problem.output = context.output(0, output_shape, 2).data<float>();
  problem.keys = key.data<float>();
  problem.values = value.data<float>();
  if (kernels_->quantize != nullptr) quantize_rows(context, *kernels_, key.dim(0), &problem);
  run_attention(context, *kernels_, problem);
}

}  // namespace glmcompile
