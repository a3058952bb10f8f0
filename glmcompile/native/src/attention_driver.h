// Attention over packed sequences: cuts it into tasks and runs the tile kernels on them.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_kernels.h"
#include "ort_abi.h"

namespace glmcompile {

// One sequence of the packed batch. Its query i stands at position past + i.
struct Segment {
  int64_t first_query;         // packed row of query 0
  int64_t queries;
  int64_t past;                // keys before the first query; below 0 if causal ones see none
  int64_t keys;                // keys in all
  int64_t first_key = 0;       // contiguous keys: packed row of key 0
  const int32_t* blocks = nullptr;  // paged keys: the sequence's row of the block table
  // By channel (kv head major), instead of the problem's; null = the problem's.
  const float* key_scale = nullptr;
  const float* value_scale = nullptr;
};

struct AttentionProblem {
  std::vector<Segment> segments;
  int num_heads, kv_num_heads;
  HeadSizes head;
  float scale;
  float softcap = 0;             // 0 = none
  int64_t window = 0;            // keys a query sees to its left, itself included; 0 = all
  bool causal = false;
  // [tokens, 2], by packed row of a query: first and past-the-last key that it sees on top, and all
  // between those and the window's. Clipped to its segment's keys; null or empty = none.
  const int32_t* attend_span = nullptr;
  const float* head_sink = nullptr;  // [num_heads]
  // [num_heads] ALiBi: slope * (key's position - query's) is added to scores after scale and cap.
  const float* alibi_slopes = nullptr;

  const float* query;  // row i of head h at query + i * query_stride + h * head.key
  int64_t query_stride;
  float* output;  // [tokens, num_heads * head.value]

  Element element = Element::kFloat;
  const void* keys;    // [tokens, kv_num_heads * head.key]
  const void* values;  // [tokens, kv_num_heads * head.value]
  int64_t block_size = 0;            // 0 = contiguous
  // Multipliers of the stored elements, by channel (kv head major) or a single one; null = 1.
  const float* key_scale = nullptr;
  const float* value_scale = nullptr;
  bool key_scale_per_channel = false;
  bool value_scale_per_channel = false;
};

void run_attention(const KernelContext& context, const AttentionKernels& kernels,
                   const AttentionProblem& problem);

}  // namespace glmcompile
