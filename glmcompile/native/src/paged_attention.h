// com.microsoft::PagedAttention for the CPU provider: float32 activations, float32 or int8 cache.
//
// Follows the schema and the CUDA kernel of ONNX Runtime, with these decisions of its own:
// - All inputs are checked before anything is written; a malformed value is an error, never
//   silently ignored. Block table entries past a sequence's last key are not read.
// - The new tokens' keys and values are stored first and attended from the cache, so that they
//   are seen as later calls will see them, rounded to int8 where the cache is int8.
// - key_cache_out and value_cache_out alias the inputs; where ONNX Runtime gives them a buffer of
//   their own, the updated cache is copied into it.
// - The heads of values may have another size than those of queries and keys: value_cache and value
//   tell it. The output is [tokens, num_heads * v_head_size].
// - attention_metadata is a hint for other providers and is not read.
#pragma once

#include "attention_driver.h"
#include "attention_kernels.h"
#include "ort_abi.h"
#include "paged_cache_update.h"

namespace glmcompile {

class PagedAttention {
 public:
  static constexpr const char* kName = "PagedAttention";
  static constexpr const char* kDomain = "com.microsoft";
  enum Input {
    kQuery, kKey, kValue, kKeyCache, kValueCache, kCumulative, kPast, kBlockTable, kCosCache,
    kSinCache, kSlotMapping, kHeadSink, kQueryNorm, kKeyNorm, kKeyScale, kValueScale, kMetadata,
  };
  static constexpr Port kInputs[] = {
      {"query", Type::kFloat},
      {"key", Type::kFloat, true},
      {"value", Type::kFloat, true},
      {"key_cache", Type::kAny},
      {"value_cache", Type::kAny, true},
      {"cumulative_sequence_length", Type::kInt32},
      {"past_seqlens", Type::kInt32},
      {"block_table", Type::kInt32},
      {"cos_cache", Type::kFloat, true},
      {"sin_cache", Type::kFloat, true},
      {"slot_mapping", Type::kInt32, true},
      {"head_sink", Type::kFloat, true},
      {"q_norm_weight", Type::kFloat, true},
      {"k_norm_weight", Type::kFloat, true},
      {"k_scale", Type::kFloat, true},
      {"v_scale", Type::kFloat, true},
      {"attention_metadata", Type::kInt32, true},
  };
  static constexpr Port kOutputs[] = {
      {"output", Type::kFloat},
      {"key_cache_out", Type::kAny, true},
      {"value_cache_out", Type::kAny, true},
  };
  static constexpr Alias kAliases[] = {{kKeyCache, 1}, {kValueCache, 2}};

  explicit PagedAttention(const KernelInfo& info);
  void compute(KernelContext& context) const { run(context, {}); }

 protected:
  // The inputs of ExtendedPagedAttention; absent = none.
  struct Extensions {
    Tensor attend_span, alibi_slopes;
  };
  void run(KernelContext& context, const Extensions& extensions) const;

 private:
  enum class Quantization { kNone, kPerTensor, kPerChannel };
  struct Call;  // what one call's inputs say, once checked

  static Quantization quantization(const KernelInfo& info, const char* name);
  Call read(const KernelContext& context, const Extensions& extensions) const;
  void read_caches(const KernelContext& context, Call* call) const;
  void read_activations(const KernelContext& context, Call* call) const;
  void read_sequences(const KernelContext& context, Call* call) const;
  void read_rotary_and_norm(const KernelContext& context, Call* call) const;
  static void read_span(const Tensor& attend_span, Call* call);
  void read_slopes(const Tensor& alibi_slopes, Call* call) const;
  const float* read_scale(const Tensor& scale, const Tensor& cache,
                          Quantization granularity) const;

  int64_t num_heads_, kv_num_heads_;
  float scale_, softcap_, qk_norm_epsilon_;
  int64_t local_window_size_, rotary_offset_;
  bool is_causal_, do_rotary_, rotary_interleaved_;
  Quantization k_quant_, v_quant_;
  Isa isa_;
};

// com.glmcompile::PagedAttention: the same operator with optional inputs that ONNX Runtime's lacks.
//
// attend_span: [tokens, 2], (first, end), the positions of the keys of a token's own image. Tokens
//   of one image see each other both ways, as Gemma 3's and PaliGemma's do: the query at position p,
//   with a window of w keys, sees keys [min(p - w + 1, first), max(p + 1, end)), from 0 without a
//   window. A token outside of images has first = end; an empty span changes nothing. The span is
//   clipped to the keys that its sequence has in this call: that an image is not cut by a step is
//   the caller's business.
// alibi_slopes: [num_heads]; a head's slope times (position of the key - position of the query) is
//   added to its scores, after scale and softcap (Press et al., "Train Short, Test Long").
class ExtendedPagedAttention : public PagedAttention {
 public:
  static constexpr const char* kDomain = "com.glmcompile";
  enum MoreInput { kAttendSpan = std::size(PagedAttention::kInputs), kAlibiSlopes };
  static constexpr auto kInputs = joined(PagedAttention::kInputs, {
      {"attend_span", Type::kInt32, true},
      {"alibi_slopes", Type::kFloat, true},
  });

  using PagedAttention::PagedAttention;
  void compute(KernelContext& context) const {
    run(context, {context.input(kAttendSpan), context.input(kAlibiSlopes)});
  }
};

}  // namespace glmcompile
