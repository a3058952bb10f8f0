#include "packed_rotary.h"

#include <algorithm>
#include <cstring>

namespace glmcompile {
namespace {

constexpr std::int64_t kTaskElements = 64 << 10;

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
      head_size_(info.required<std::int64_t>("head_size")),
      rotary_dim_(info.attribute<std::int64_t>("rotary_embedding_dim", 0)),
      interleaved_(info.attribute<std::int64_t>("interleaved", 0) != 0) {
  if (rotary_dim_ == 0) rotary_dim_ = head_size_;
  check(num_heads_ > 0 && head_size_ > 0,
        "attributes num_heads and head_size: expected positive numbers, got ", num_heads_, " and ",
        head_size_);
  check(rotary_dim_ > 0 && rotary_dim_ <= head_size_ && rotary_dim_ % 2 == 0,
        "attribute rotary_embedding_dim: expected an even number up to ", head_size_, ", got ",
        rotary_dim_);
}

void PackedRotary::compute(KernelContext& context) const {
  const Tensor x = context.input(0), cos = context.input(1), sin = context.input(2);
  const std::int64_t half = rotary_dim_ / 2, rotated = num_heads_ * head_size_;
  check(x.rank() >= 1 && x.dim(x.rank() - 1) >= rotated, "x: expected [..., at least ", rotated,
        "], got ", x.shape_text());
  const std::int64_t width = x.dim(x.rank() - 1), tokens = width == 0 ? 0 : x.size() / width;
  for (const Tensor* table : {&cos, &sin}) {
    check(table->rank() >= 1 && table->dim(table->rank() - 1) == half &&
              table->size() == tokens * half,
          table->name(), ": expected [..., ", tokens, ", ", half, "], got ", table->shape_text());
  }
  const std::int64_t shape[] = {tokens, width};
  const float *from = x.data<float>(), *c = cos.data<float>(), *s = sin.data<float>();
  float* to = context.output(0, shape, 2).data<float>();
  const auto rotate = interleaved_ ? rotate_neighbours : rotate_halves;
  const std::int64_t group = std::max<std::int64_t>(kTaskElements / width, 1);
  context.parallel_for(static_cast<std::size_t>((tokens + group - 1) / group), [&](std::size_t t) {
    const std::int64_t first = static_cast<std::int64_t>(t) * group;
    for (std::int64_t row = first; row < std::min(first + group, tokens); ++row) {
      const float* in = from + row * width;
      float* out = to + row * width;
      for (std::int64_t head = 0; head < num_heads_; ++head, in += head_size_, out += head_size_) {
        rotate(in, c + row * half, s + row * half, half, out);
        std::copy(in + rotary_dim_, in + head_size_, out + rotary_dim_);
      }
      std::copy(in, from + (row + 1) * width, out);
    }
  });
}

}  // namespace glmcompile
