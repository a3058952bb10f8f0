#include "paged_cache_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace glmcompile {
namespace {

constexpr int64_t kTokensPerTask = 16;

// Stores in / scale, rounded to nearest even and clamped to [-128, 127]. Free of aliasing and of
// branches on i, so that compilers make vectors of it.
void quantize(const float* __restrict in, const float* __restrict inverse, int64_t count,
              int8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    // Clamped before the conversion, which is undefined beyond int32. The comparisons send NaN to
    // the lower bound. Adding and subtracting 1.5 * 2^23 rounds to nearest even.
    float x = in[i] * inverse[i];
    x = x > -128.0f ? x : -128.0f;
    x = x < 127.0f ? x : 127.0f;
    out[i] = static_cast<int8_t>(static_cast<int32_t>((x + 12582912.0f) - 12582912.0f));
  }
}

// 1 / scale for every channel of a token; 0 for a scale of 0, which stores 0.
std::vector<float> inverse_scales(const float* scale, bool per_channel, int64_t channels) {
  std::vector<float> inverse(channels);
  for (int64_t i = 0; i < channels; ++i) {
    const float unit = scale[per_channel ? i : 0];
    inverse[i] = unit == 0.0f ? 0.0f : 1.0f / unit;
  }
  return inverse;
}

// inverse_scale: of the head's channels; null for a float cache.
void store(const float* in, const float* inverse_scale, int64_t head_size, void* cache,
           int64_t index) {
  if (inverse_scale == nullptr)
    std::memcpy(static_cast<float*>(cache) + index, in, head_size * sizeof(float));
  else
    quantize(in, inverse_scale, head_size, static_cast<int8_t*>(cache) + index);
}

void update_token(const CacheUpdate& u, const float* inverse_key_scale,
                  const float* inverse_value_scale, int64_t t) {
  const int64_t size = u.head.key, value_size = u.head.value;
  if (u.transformed_query != nullptr)
    for (int64_t h = 0; h < u.num_heads; ++h)
      u.transform.apply(u.query + t * u.query_stride + h * size,
                        u.transformed_query + (t * u.num_heads + h) * size, size, u.query_norm,
                        u.position[t]);
  if (u.slot[t] < 0) return;
  for (int64_t h = 0; h < u.kv_num_heads; ++h) {
    const int64_t head = u.slot[t] * u.kv_num_heads + h;
    float key[kMaxHeadSize];
    u.transform.apply(u.key + t * u.key_stride + h * size, key, size, u.key_norm, u.position[t]);
    const auto from = [](const float* inverse, int64_t at) { return inverse ? inverse + at : inverse; };
    store(key, from(inverse_key_scale, h * size), size, u.key_cache, head * size);
    store(u.value + t * u.value_stride + h * value_size, from(inverse_value_scale, h * value_size),
          value_size, u.value_cache, head * value_size);
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

void update_cache(const KernelContext& context, const CacheUpdate& update) {
  std::vector<float> key_inverse, value_inverse;
  if (update.element == Element::kInt8) {
    key_inverse = inverse_scales(update.key_scale, update.key_scale_per_channel,
                                 update.kv_num_heads * update.head.key);
    value_inverse = inverse_scales(update.value_scale, update.value_scale_per_channel,
                                   update.kv_num_heads * update.head.value);
  }
  const float* key = key_inverse.empty() ? nullptr : key_inverse.data();
  const float* value = value_inverse.empty() ? nullptr : value_inverse.data();
  const int64_t tasks = (update.tokens + kTokensPerTask - 1) / kTokensPerTask;
  context.parallel_for(tasks, [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * kTokensPerTask;
    for (int64_t t = begin; t < std::min(begin + kTokensPerTask, update.tokens); ++t)
      update_token(update, key, value, t);
  });
}

}  // namespace glmcompile
