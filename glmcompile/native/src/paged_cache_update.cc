#include "paged_cache_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace glmcompile {
namespace {

constexpr int64_t kTokensPerTask = 16;

// Free of aliasing and of branches on i, so that compilers make vectors of it.
template <class Scale>
void quantize(const float* __restrict in, const Scale& scale, int64_t count,
              int8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const float unit = scale(i);
    const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
    // Clamped before the conversion, which is undefined beyond int32. The comparisons send NaN to
    // the lower bound. Adding and subtracting 1.5 * 2^23 rounds to nearest even.
    float x = in[i] * inverse;
    x = x > -128.0f ? x : -128.0f;
    x = x < 127.0f ? x : 127.0f;
    out[i] = static_cast<int8_t>(static_cast<int32_t>((x + 12582912.0f) - 12582912.0f));
  }
}

void store(const float* in, const float* scale, bool per_channel, int64_t head, int64_t head_size,
           Element element, void* cache, int64_t index) {
  if (element == Element::kFloat) {
    std::memcpy(static_cast<float*>(cache) + index, in, head_size * sizeof(float));
  } else {
    quantize_to_int8(in, per_channel ? scale + head * head_size : scale, per_channel, head_size,
                     static_cast<int8_t*>(cache) + index);
  }
}

void update_token(const CacheUpdate& u, int64_t t) {
  const int64_t size = u.head_size;
  if (u.transformed_query != nullptr)
    for (int64_t h = 0; h < u.num_heads; ++h)
      u.transform.apply(u.query + t * u.query_stride + h * size,
                        u.transformed_query + (t * u.num_heads + h) * size, size, u.query_norm,
                        u.position[t]);
  if (u.slot[t] < 0) return;
  for (int64_t h = 0; h < u.kv_num_heads; ++h) {
    const int64_t index = (u.slot[t] * u.kv_num_heads + h) * size;
    float key[kMaxHeadSize];
    u.transform.apply(u.key + t * u.key_stride + h * size, key, size, u.key_norm, u.position[t]);
    store(key, u.key_scale, u.key_scale_per_channel, h, size, u.element, u.key_cache, index);
    store(u.value + t * u.value_stride + h * size, u.value_scale, u.value_scale_per_channel, h,
          size, u.element, u.value_cache, index);
  }
}

}  // namespace

void HeadTransform::apply(const float* in, float* out, int64_t head_size, const float* norm_weight,
                          int64_t position) const {
  float head[kMaxHeadSize];
  if (norm_weight != nullptr) {
    float squares = 0;
    for (int64_t d = 0; d < head_size; ++d) squares += in[d] * in[d];
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(head_size) + epsilon);
    for (int64_t d = 0; d < head_size; ++d) head[d] = in[d] * factor * norm_weight[d];
  } else {
    std::copy_n(in, head_size, head);
  }
  std::copy_n(head, head_size, out);
  if (cos == nullptr) return;
  const float* c = cos + position * rotary_half;
  const float* s = sin + position * rotary_half;
  const float* x = head + rotary_offset;
  float* y = out + rotary_offset;
  for (int64_t i = 0; i < rotary_half; ++i) {
    const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + rotary_half;
    y[a] = x[a] * c[i] - x[b] * s[i];
    y[b] = x[b] * c[i] + x[a] * s[i];
  }
}

void quantize_to_int8(const float* in, const float* scale, bool per_channel, int64_t count,
                      int8_t* out) {
  if (per_channel)
    quantize(in, [scale](int64_t i) { return scale[i]; }, count, out);
  else
    quantize(in, [scale](int64_t) { return scale[0]; }, count, out);
}

void update_cache(const KernelContext& context, const CacheUpdate& update) {
  const int64_t tasks = (update.tokens + kTokensPerTask - 1) / kTokensPerTask;
  context.parallel_for(tasks, [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * kTokensPerTask;
    for (int64_t t = begin; t < std::min(begin + kTokensPerTask, update.tokens); ++t)
      update_token(update, t);
  });
}

}  // namespace glmcompile
