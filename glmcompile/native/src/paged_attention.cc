#include "paged_attention.h"

#include <cmath>
#include <cstring>

#include "scratch_buffer.h"

namespace glmcompile {

struct PagedAttention::Call {
  int64_t tokens = 0, num_blocks = 0, block_size = 0;
  HeadSizes head{};
  const float *query = nullptr, *key = nullptr, *value = nullptr;
  int64_t query_stride = 0, key_stride = 0, value_stride = 0;
  Tensor key_cache, value_cache;
  Element element = Element::kFloat;
  const float *key_scale = nullptr, *value_scale = nullptr;
  std::vector<Segment> segments;
  std::vector<int64_t> position, slot;  // [tokens]
  const int32_t* attend_span = nullptr;
  const float* alibi_slopes = nullptr;
  HeadTransform transform;
  const float *query_norm = nullptr, *key_norm = nullptr, *head_sink = nullptr;
};

PagedAttention::Quantization PagedAttention::quantization(const KernelInfo& info,
                                                          const char* name) {
  const std::string value = info.attribute<std::string>(name, "NONE");
  if (value == "NONE") return Quantization::kNone;
  if (value == "PER_TENSOR") return Quantization::kPerTensor;
  if (value == "PER_CHANNEL") return Quantization::kPerChannel;
  fail("attribute ", name, ": expected NONE, PER_TENSOR or PER_CHANNEL, got ", value);
}

PagedAttention::PagedAttention(const KernelInfo& info)
    : num_heads_(info.required<int64_t>("num_heads")),
      kv_num_heads_(info.required<int64_t>("kv_num_heads")),
      scale_(info.attribute<float>("scale", 0.0f)),
      softcap_(info.attribute<float>("softcap", 0.0f)),
      qk_norm_epsilon_(info.attribute<float>("qk_norm_epsilon", 1e-6f)),
      local_window_size_(info.attribute<int64_t>("local_window_size", -1)),
      rotary_offset_(info.attribute<int64_t>("rotary_offset", 0)),
      is_causal_(info.attribute<int64_t>("is_causal", 1) != 0),
      do_rotary_(info.attribute<int64_t>("do_rotary", 0) != 0),
      rotary_interleaved_(info.attribute<int64_t>("rotary_interleaved", 0) != 0),
      k_quant_(quantization(info, "k_quant_type")),
      v_quant_(quantization(info, "v_quant_type")),
      isa_(selected_isa()) {
  check(num_heads_ > 0 && kv_num_heads_ > 0 && num_heads_ % kv_num_heads_ == 0,
        "attribute num_heads: ", num_heads_, " is not a positive multiple of kv_num_heads ",
        kv_num_heads_);
  check(std::isfinite(qk_norm_epsilon_) && qk_norm_epsilon_ > 0,
        "attribute qk_norm_epsilon: expected a positive number, got ", qk_norm_epsilon_);
  check(std::isfinite(softcap_) && softcap_ >= 0,
        "attribute softcap: expected 0 or a positive number, got ", softcap_);
  check(rotary_offset_ >= 0 && rotary_offset_ % 8 == 0,
        "attribute rotary_offset: expected a multiple of 8, got ", rotary_offset_);
  const std::string layout = info.attribute<std::string>("kv_cache_layout", "SEPARATE");
  check(layout == "SEPARATE", "attribute kv_cache_layout: the CPU kernel supports SEPARATE, not ",
        layout);
  check(info.attribute<int64_t>("v_head_size", 0) == 0,
        "attribute v_head_size: only valid with kv_cache_layout LATENT, which the CPU kernel does "
        "not support");
  for (const char* name : {"k_cache_dtype", "v_cache_dtype"}) {
    const std::string type = info.attribute<std::string>(name, "");
    check(type.empty() || type == "int8", "attribute ", name,
          ": the CPU kernel supports float32 and int8 caches, not ", type);
    const Quantization quantized = name[0] == 'k' ? k_quant_ : v_quant_;
    check(type.empty() || quantized != Quantization::kNone, "attribute ", name, ": ", type,
          " needs ", name[0], "_quant_type");
  }
}

PagedAttention::Call PagedAttention::read(const KernelContext& context,
                                          const Extensions& extensions) const {
  Call call;
  read_caches(context, &call);
  read_activations(context, &call);
  read_sequences(context, &call);
  read_rotary_and_norm(context, &call);
  if (extensions.attend_span) read_span(extensions.attend_span, &call);
  if (extensions.alibi_slopes) read_slopes(extensions.alibi_slopes, &call);
  return call;
}

// The caches tell the sizes of heads, which packed QKV alone would leave open.
void PagedAttention::read_caches(const KernelContext& context, Call* call) const {
  const Tensor keys = call->key_cache = context.input(kKeyCache);
  const Tensor values = call->value_cache = context.input(kValueCache);
  check(static_cast<bool>(values),
        "value_cache: required, since the CPU kernel does not support kv_cache_layout LATENT");
  for (const Tensor* cache : {&keys, &values}) {
    check(cache->type() == Type::kFloat || cache->type() == Type::kInt8, cache->name(),
          ": the CPU kernel supports float32 and int8 caches, got ", type_name(cache->type()));
    check(cache->rank() == 4 && cache->dim(1) > 0 && cache->dim(2) == kv_num_heads_, cache->name(),
          ": expected [num_blocks, block_size, ", kv_num_heads_, ", head_size], got ",
          cache->shape_text());
    check(valid_head_size(cache->dim(3)), cache->name(), ": head_size ", cache->dim(3),
          " is not a multiple of 8 up to ", kMaxHeadSize);
  }
  check(values.type() == keys.type(), "value_cache: expected ", type_name(keys.type()),
        " like key_cache, got ", type_name(values.type()));
  check(values.dim(0) == keys.dim(0) && values.dim(1) == keys.dim(1),
        "value_cache: expected the blocks of key_cache ", keys.shape_text(), ", got ",
        values.shape_text());
  call->num_blocks = keys.dim(0);
  call->block_size = keys.dim(1);
  call->head = {static_cast<int>(keys.dim(3)), static_cast<int>(values.dim(3))};
  call->element = keys.type() == Type::kFloat ? Element::kFloat : Element::kInt8;
  call->key_scale = read_scale(context.input(kKeyScale), keys, k_quant_);
  call->value_scale = read_scale(context.input(kValueScale), values, v_quant_);
}

void PagedAttention::read_activations(const KernelContext& context, Call* call) const {
  const Tensor query = context.input(kQuery), key = context.input(kKey),
               value = context.input(kValue);
  check(query.rank() == 2, "query: expected rank 2, got ", query.shape_text());
  check(static_cast<bool>(key) == static_cast<bool>(value),
        "key and value must be given together, or both left out for packed QKV");
  call->tokens = query.dim(0);
  const int64_t query_width = num_heads_ * call->head.key;
  const int64_t key_width = kv_num_heads_ * call->head.key;
  const int64_t value_width = kv_num_heads_ * call->head.value;
  const auto read = [&](const Tensor& t, int64_t width, const char* note) {
    check(t.rank() == 2 && t.dim(0) == call->tokens && t.dim(1) == width, t.name(), ": expected [",
          call->tokens, ", ", width, "]", note, " for the heads of the caches, got ",
          t.shape_text());
    return t.data<float>();
  };
  if (key) {
    call->query = read(query, query_width, "");
    call->key = read(key, key_width, "");
    call->value = read(value, value_width, "");
    call->query_stride = query_width;
    call->key_stride = key_width;
    call->value_stride = value_width;
  } else {
    const int64_t width = query_width + key_width + value_width;
    call->query = read(query, width, " (packed QKV)");
    call->key = call->query + query_width;
    call->value = call->key + key_width;
    call->query_stride = call->key_stride = call->value_stride = width;
  }
}

const float* PagedAttention::read_scale(const Tensor& scale, const Tensor& cache,
                                        Quantization granularity) const {
  const char side = cache.name()[0];
  const int64_t head_size = cache.dim(3);
  if (cache.type() == Type::kFloat) {
    check(granularity == Quantization::kNone, "attribute ", side,
          "_quant_type: must be NONE for the float32 ", cache.name());
    return nullptr;
  }
  check(granularity != Quantization::kNone, "attribute ", side,
        "_quant_type: PER_TENSOR or PER_CHANNEL is required for the int8 ", cache.name());
  check(static_cast<bool>(scale), scale.name(), ": required for the int8 ", cache.name());
  const float* data = scale.data<float>();
  if (granularity == Quantization::kPerTensor)
    check(scale.size() == 1, scale.name(), ": expected [1] for PER_TENSOR, got ",
          scale.shape_text());
  else
    check(scale.rank() == 3 && scale.dim(0) == kv_num_heads_ && scale.dim(1) == 1 &&
              scale.dim(2) == head_size,
          scale.name(), ": expected [", kv_num_heads_, ", 1, ", head_size,
          "] for PER_CHANNEL, got ", scale.shape_text());
  for (int64_t i = 0; i < scale.size(); ++i)
    check(std::isfinite(data[i]) && data[i] >= 0, scale.name(), ": element ", i, " is ", data[i],
          ", expected a finite number that is not negative");
  return data;
}

void PagedAttention::read_sequences(const KernelContext& context, Call* call) const {
  const Tensor cumulative = context.input(kCumulative), past = context.input(kPast),
               table = context.input(kBlockTable), slots = context.input(kSlotMapping);
  check(cumulative.rank() == 1 && cumulative.dim(0) >= 1,
        "cumulative_sequence_length: expected [sequences + 1], got ", cumulative.shape_text());
  const int64_t count = cumulative.dim(0) - 1;
  check(past.rank() == 1 && past.dim(0) == count, "past_seqlens: expected [", count, "], got ",
        past.shape_text());
  check(table.rank() == 2 && table.dim(0) == count, "block_table: expected [", count,
        ", max_blocks_per_sequence], got ", table.shape_text());
  const int32_t* ends = cumulative.data<int32_t>();
  check(ends[0] == 0, "cumulative_sequence_length: must start with 0, got ", ends[0]);
  for (int64_t i = 0; i < count; ++i)
    check(ends[i] <= ends[i + 1], "cumulative_sequence_length: decreases from ", ends[i], " to ",
          ends[i + 1], " at ", i + 1);
  check(ends[count] == call->tokens, "cumulative_sequence_length: must end with the number of "
        "tokens ", call->tokens, ", got ", ends[count]);

  call->position.resize(call->tokens);
  call->slot.resize(call->tokens);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = past.data<int32_t>()[i], queries = ends[i + 1] - ends[i];
    check(length >= 0, "past_seqlens: entry ", i, " is negative: ", length);
    const int32_t* blocks = table.data<int32_t>() + i * table.dim(1);
    // A sequence without new tokens takes no part in the call; its pages are not looked at.
    const int64_t needed =
        queries == 0 ? 0 : (length + queries + call->block_size - 1) / call->block_size;
    check(needed <= table.dim(1), "block_table: sequence ", i, " has ", length + queries,
          " tokens and needs ", needed, " blocks of ", call->block_size, ", got ", table.dim(1),
          " columns");
    for (int64_t b = 0; b < needed; ++b)
      check(blocks[b] >= -1 && blocks[b] < call->num_blocks, "block_table: entry [", i, ", ", b,
            "] is ", blocks[b], ", expected -1 (unmapped) or a block below ", call->num_blocks);
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t position = length + q, block = blocks[position / call->block_size];
      call->position[ends[i] + q] = position;
      call->slot[ends[i] + q] =
          block < 0 ? -1 : block * call->block_size + position % call->block_size;
    }
    if (queries > 0)
      call->segments.push_back({ends[i], queries, length, length + queries, 0, blocks});
  }
  if (!slots) return;
  check(slots.rank() == 1 && slots.dim(0) == call->tokens, "slot_mapping: expected [",
        call->tokens, "], got ", slots.shape_text());
  const int64_t capacity = call->num_blocks * call->block_size;
  for (int64_t t = 0; t < call->tokens; ++t) {
    const int64_t slot = slots.data<int32_t>()[t];
    check(slot >= -1 && slot < capacity, "slot_mapping: entry ", t, " is ", slot,
          ", expected -1 (not stored) or a slot below ", capacity);
    call->slot[t] = slot;
  }
}

void PagedAttention::read_rotary_and_norm(const KernelContext& context, Call* call) const {
  const Tensor query_norm = context.input(kQueryNorm), key_norm = context.input(kKeyNorm),
               sink = context.input(kHeadSink);
  check(static_cast<bool>(query_norm) == static_cast<bool>(key_norm),
        "q_norm_weight and k_norm_weight must be given together");
  for (const Tensor* norm : {&query_norm, &key_norm})
    check(!*norm || (norm->rank() == 1 && norm->dim(0) == call->head.key), norm->name(),
          ": expected [", call->head.key, "], got ", norm->shape_text());
  if (query_norm) {
    call->query_norm = query_norm.data<float>();
    call->key_norm = key_norm.data<float>();
  }
  call->transform.epsilon = qk_norm_epsilon_;
  if (sink) {
    check(sink.rank() == 1 && sink.dim(0) == num_heads_, "head_sink: expected [", num_heads_,
          "], got ", sink.shape_text());
    call->head_sink = sink.data<float>();
  }
  if (!do_rotary_) return;
  const Tensor cos = context.input(kCosCache), sin = context.input(kSinCache);
  check(cos && sin, "cos_cache and sin_cache: required when do_rotary is 1");
  check(cos.rank() == 2 && rotary_offset_ + 2 * cos.dim(1) <= call->head.key,
        "cos_cache: expected [positions, up to ", (call->head.key - rotary_offset_) / 2,
        "], got ", cos.shape_text());
  check(sin.rank() == 2 && sin.dim(0) == cos.dim(0) && sin.dim(1) == cos.dim(1),
        "sin_cache: expected the shape of cos_cache ", cos.shape_text(), ", got ",
        sin.shape_text());
  for (const Segment& segment : call->segments)
    check(segment.keys <= cos.dim(0), "cos_cache: has ", cos.dim(0),
          " positions, but a sequence has ", segment.keys, " tokens");
  call->transform.cos = cos.data<float>();
  call->transform.sin = sin.data<float>();
  call->transform.rotary_half = cos.dim(1);
  call->transform.rotary_offset = rotary_offset_;
  call->transform.interleaved = rotary_interleaved_;
}

void PagedAttention::read_span(const Tensor& attend_span, Call* call) {
  check(attend_span.rank() == 2 && attend_span.dim(0) == call->tokens && attend_span.dim(1) == 2,
        "attend_span: expected [", call->tokens, ", 2], got ", attend_span.shape_text());
  call->attend_span = attend_span.data<int32_t>();
  for (int64_t t = 0; t < call->tokens; ++t) {
    const int32_t first = call->attend_span[2 * t], end = call->attend_span[2 * t + 1];
    check(first >= 0 && first <= call->position[t] && end >= first, "attend_span: entry ", t,
          " is (", first, ", ", end, "), expected a first from 0 to the token's position ",
          call->position[t], " and an end not below it");
  }
}

void PagedAttention::read_slopes(const Tensor& alibi_slopes, Call* call) const {
  check(alibi_slopes.rank() == 1 && alibi_slopes.dim(0) == num_heads_, "alibi_slopes: expected [",
        num_heads_, "], got ", alibi_slopes.shape_text());
  call->alibi_slopes = alibi_slopes.data<float>();
  for (int64_t h = 0; h < num_heads_; ++h)
    check(std::isfinite(call->alibi_slopes[h]), "alibi_slopes: entry ", h, " is ",
          call->alibi_slopes[h], ", expected a finite number");
}

void PagedAttention::run(KernelContext& context, const Extensions& extensions) const {
  Call call = read(context, extensions);
  const int64_t query_width = num_heads_ * call.head.key;
  const int64_t output_shape[] = {call.tokens, num_heads_ * call.head.value};
  const Tensor output = context.output(0, output_shape, 2);
  const Tensor cache_outputs[] = {context.output(1, call.key_cache.shape(), 4),
                                  context.output(2, call.value_cache.shape(), 4)};

  CacheUpdate update{};
  update.tokens = call.tokens;
  update.num_heads = num_heads_;
  update.kv_num_heads = kv_num_heads_;
  update.head = call.head;
  update.query = call.query;
  update.key = call.key;
  update.value = call.value;
  update.query_stride = call.query_stride;
  update.key_stride = call.key_stride;
  update.value_stride = call.value_stride;
  update.position = call.position.data();
  update.slot = call.slot.data();
  update.transform = call.transform;
  update.query_norm = call.query_norm;
  update.key_norm = call.key_norm;
  static thread_local ScratchBuffer query_buffer;
  if (call.query_norm != nullptr || call.transform.cos != nullptr)
    update.transformed_query = reinterpret_cast<float*>(
        query_buffer.reserve(static_cast<size_t>(call.tokens) * query_width * sizeof(float)));
  update.element = call.element;
  update.key_cache = call.key_cache.raw();
  update.value_cache = call.value_cache.raw();
  update.key_scale = call.key_scale;
  update.value_scale = call.value_scale;
  update.key_scale_per_channel = k_quant_ == Quantization::kPerChannel;
  update.value_scale_per_channel = v_quant_ == Quantization::kPerChannel;
  update_cache(context, update);

  AttentionProblem problem{};
  problem.segments = std::move(call.segments);
  problem.num_heads = static_cast<int>(num_heads_);
  problem.kv_num_heads = static_cast<int>(kv_num_heads_);
  problem.head = call.head;
  problem.scale = scale_ != 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(call.head.key));
  problem.softcap = softcap_;
  problem.window = local_window_size_;
  problem.causal = is_causal_;
  problem.attend_span = call.attend_span;
  problem.alibi_slopes = call.alibi_slopes;
  problem.head_sink = call.head_sink;
  const bool transformed = update.transformed_query != nullptr;
  problem.query = transformed ? update.transformed_query : call.query;
  problem.query_stride = transformed ? query_width : call.query_stride;
  problem.output = output.data<float>();
  problem.element = call.element;
  problem.keys = call.key_cache.raw();
  problem.values = call.value_cache.raw();
  problem.block_size = call.block_size;
  problem.key_scale = call.key_scale;
  problem.value_scale = call.value_scale;
  problem.key_scale_per_channel = update.key_scale_per_channel;
  problem.value_scale_per_channel = update.value_scale_per_channel;
  // Rounding float keys to int8 takes scales, which depend on the keys there are so far; only the
  // int8 cache, whose scales are given, keeps chunked prefill equal to prefill at once.
  const Precision precision =
      call.element == Element::kInt8 ? Precision::kInt8 : Precision::kFloat32;
  run_attention(context, attention_kernels(isa_, call.element, precision), problem);

  const Tensor* caches[] = {&call.key_cache, &call.value_cache};
  for (int i = 0; i < 2; ++i) {
    if (!cache_outputs[i] || cache_outputs[i].raw() == caches[i]->raw()) continue;
    const size_t bytes = static_cast<size_t>(caches[i]->size()) *
                         (call.element == Element::kFloat ? sizeof(float) : 1);
    if (bytes > 0) std::memcpy(cache_outputs[i].raw(), caches[i]->raw(), bytes);
  }
}

}  // namespace glmcompile
