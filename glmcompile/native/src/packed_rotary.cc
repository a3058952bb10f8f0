#include "packed_rotary.h"

#include <algorithm>
#include <cstring>

namespace glmcompile {
namespace {

constexpr std::int64_t kTaskElements = 32 << 10;

void rotate_halves(const float* __restrict x, const float* __restrict cos,
                   const float* __restrict sin, std::int64_t half, float* __restrict y) {
  for (std::int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
}

void rotate_neighbours(const float* __restrict x, const float* __restrict cos,
                       const float* __restrict sin, std::int64_t half, float* __restrict y) {
  for (std::int64_t i = 0; i < half; ++i) {
    y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
    y[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
  }
}

}  // namespace

PackedRotary::PackedRotary(const KernelInfo& info)
    : num_heads_(info.required<std::int64_t>("num_heads")),
      kv_num_heads_(info.required<std::int64_t>("kv_num_heads")),
      head_size_(info.required<std::int64_t>("head_size")),
      rotary_dim_(info.attribute<std::int64_t>("rotary_embedding_dim", 0)),
      interleaved_(info.attribute<std::int64_t>("interleaved", 0) != 0) {
  if (rotary_dim_ == 0) rotary_dim_ = head_size_;
  check(num_heads_ > 0 && kv_num_heads_ > 0 && head_size_ > 0,
        "attributes num_heads, kv_num_heads and head_size: expected positive numbers, got ",
        num_heads_, ", ", kv_num_heads_, " and ", head_size_);
  check(rotary_dim_ > 0 && rotary_dim_ <= head_size_ && rotary_dim_ % 2 == 0,
        "attribute rotary_embedding_dim: expected an even number up to ", head_size_, ", got ",
        rotary_dim_);
}

void PackedRotary::compute(KernelContext& context) const {
  const Tensor x = context.input(0), cos = context.input(1), sin = context.input(2);
  const std::int64_t half = rotary_dim_ / 2, width = (num_heads_ + 2 * kv_num_heads_) * head_size_;
  check(x.rank() >= 1 && x.dim(x.rank() - 1) == width, "x: expected [..., ", width, "], got ",
        x.shape_text());
  const std::int64_t tokens = x.size() / width;
  for (const Tensor* table : {&cos, &sin}) {
    check(table->rank() >= 1 && table->dim(table->rank() - 1) == half &&
              table->size() == tokens * half,
          table->name(), ": expected [..., ", tokens, ", ", half, "], got ", table->shape_text());
  }
  const std::int64_t kv_width = kv_num_heads_ * head_size_, kv_shape[] = {tokens, kv_width};
  const Tensor key = context.output(1, kv_shape, 2), value = context.output(2, kv_shape, 2);
  check(bool(key) == bool(value), "outputs: expected one or three");
  const std::int64_t query_width = key ? num_heads_ * head_size_ : width;
  const std::int64_t query_shape[] = {tokens, query_width};
  float* query_out = context.output(0, query_shape, 2).data<float>();
  // Where each part of a row goes, and how far its rows are apart.
  float* key_out = key ? key.data<float>() : query_out + num_heads_ * head_size_;
  float* value_out = key ? value.data<float>() : key_out + kv_width;
  const std::int64_t kv_stride = key ? kv_width : width;

  const float *from = x.data<float>(), *c = cos.data<float>(), *s = sin.data<float>();
  const auto rotate = interleaved_ ? rotate_neighbours : rotate_halves;
  const auto rotate_heads = [&](const float* in, std::int64_t heads, std::int64_t row, float* out) {
    for (std::int64_t head = 0; head < heads; ++head, in += head_size_, out += head_size_) {
      rotate(in, c + row * half, s + row * half, half, out);
      std::copy(in + rotary_dim_, in + head_size_, out + rotary_dim_);
    }
  };
  const std::int64_t group = std::max<std::int64_t>(kTaskElements / width, 1);
  context.parallel_for(static_cast<std::size_t>((tokens + group - 1) / group), [&](std::size_t t) {
    const std::int64_t first = static_cast<std::int64_t>(t) * group;
    for (std::int64_t row = first; row < std::min(first + group, tokens); ++row) {
      const float* in = from + row * width;
      rotate_heads(in, num_heads_, row, query_out + row * query_width);
      in += num_heads_ * head_size_;
      rotate_heads(in, kv_num_heads_, row, key_out + row * kv_stride);
      in += kv_width;
      std::copy(in, in + kv_width, value_out + row * kv_stride);
    }
  });
}

}  // namespace glmcompile
