// What PagedAttention does to new tokens before it attends: QK-Norm, rotary embedding, and storing
// keys and values in the paged cache.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_kernels.h"
#include "ort_abi.h"

namespace glmcompile {

// RMSNorm over a head, then rotation of channels [rotary_offset, rotary_offset + 2 * half).
struct HeadTransform {
  float epsilon = 0;
  const float* cos = nullptr;  // [positions, rotary_half]; null = no rotation
  const float* sin = nullptr;
  int64_t rotary_half = 0;
  int64_t rotary_offset = 0;
  bool interleaved = false;

  // in, out: [head_size], may be the same; norm_weight: [head_size] or null.
  void apply(const float* in, float* out, int64_t head_size, const float* norm_weight,
             int64_t position) const;
};

struct CacheUpdate {
  int64_t tokens, num_heads, kv_num_heads;
  HeadSizes head;
  const float* query;  // token t at query + t * query_stride
  const float* key;
  const float* value;
  int64_t query_stride, key_stride, value_stride;
  const int64_t* position;  // [tokens] in its sequence, for the rotation
  const int64_t* slot;      // [tokens] token slot of the cache, or -1: not stored
  HeadTransform transform;
  const float* query_norm;  // [head.key] or null
  const float* key_norm;
  float* transformed_query;  // [tokens, num_heads * head.key], or null where nothing changes it
  Element element;
  void* key_cache;    // [slots, kv_num_heads, head.key]
  void* value_cache;  // [slots, kv_num_heads, head.value]
  const float* key_scale;
  const float* value_scale;
  bool key_scale_per_channel, value_scale_per_channel;
};

void update_cache(const KernelContext& context, const CacheUpdate& update);

}  // namespace glmcompile
