#include "packed_gated_delta_rule.h"

#include <algorithm>
#include <cmath>

#include "packed_sequences.h"
#include "scratch_buffer.h"

namespace glmcompile {

PackedGatedDeltaRule::PackedGatedDeltaRule(const KernelInfo& info)
    : k_heads_(info.required<int64_t>("k_heads")),
      v_heads_(info.required<int64_t>("v_heads")),
      scale_(info.attribute<float>("scale", 0.0f)),
      l2norm_epsilon_(info.attribute<float>("l2norm_epsilon", 0.0f)),
      kernels_(&recurrent_kernels(selected_isa())) {
  check(k_heads_ > 0 && v_heads_ > 0 && v_heads_ % k_heads_ == 0, "attribute v_heads: ", v_heads_,
        " is not a positive multiple of k_heads ", k_heads_);
  check(std::isfinite(scale_), "attribute scale: expected a finite number, got ", scale_);
  check(std::isfinite(l2norm_epsilon_) && l2norm_epsilon_ >= 0,
        "attribute l2norm_epsilon: expected 0 or a positive number, got ", l2norm_epsilon_);
}

void PackedGatedDeltaRule::compute(KernelContext& context) const {
  const Tensor query = context.input(kQuery), key = context.input(kKey),
               value = context.input(kValue), decay = context.input(kDecay),
               beta = context.input(kBeta), pool = context.input(kState);
  check(pool.rank() == 4 && pool.dim(1) == v_heads_ && pool.dim(2) > 0 && pool.dim(3) > 0,
        "state: expected [slots, ", v_heads_, ", k_size, v_size], got ", pool.shape_text());
  const int64_t k_size = pool.dim(2), v_size = pool.dim(3);
  const int64_t key_width = k_heads_ * k_size, value_width = v_heads_ * v_size;
  check(query.rank() == 2 && query.dim(1) == key_width, "query: expected [tokens, ", key_width,
        "], got ", query.shape_text());
  const int64_t tokens = query.dim(0);
  expect_shape(key, {tokens, key_width});
  expect_shape(value, {tokens, value_width});
  check(decay.rank() == 2 && decay.dim(0) == tokens &&
            (decay.dim(1) == v_heads_ || decay.dim(1) == v_heads_ * k_size),
        "decay: expected [", tokens, ", ", v_heads_, "] or [", tokens, ", ", v_heads_ * k_size,
        "], got ", decay.shape_text());
  if (beta) expect_shape(beta, {tokens, v_heads_});
  const std::vector<PackedSequence> sequences =
      read_sequences(context.input(kSlots), context.input(kCumulative), context.input(kPast),
                     tokens, pool.dim(0));

  DeltaScan all{};  // what the tasks have in common, pointers at the first token's first head
  all.k_size = k_size;
  all.v_size = v_size;
  all.query = query.data<float>();
  all.key = key.data<float>();
  all.key_stride = key_width;
  all.value = value.data<float>();
  all.value_stride = value_width;
  all.decay = decay.data<float>();
  all.decay_stride = decay.dim(1);
  all.decay_per_channel = decay.dim(1) != v_heads_;
  all.beta = beta ? beta.data<float>() : nullptr;
  all.beta_stride = v_heads_;
  all.scale = scale_ != 0 ? scale_ : 1.0f / std::sqrt(static_cast<float>(k_size));
  all.l2norm_epsilon = l2norm_epsilon_;
  all.state = pool.data<float>();
  all.output = context.output(0, value.shape(), 2).data<float>();
  const Tensor pool_out = context.output(1, pool.shape(), 4);

  // Columns of a state never meet, so that one head is work for several threads.
  const int64_t blocks = (v_size + kDeltaColumns - 1) / kDeltaColumns;
  context.parallel_for(sequences.size() * static_cast<size_t>(v_heads_ * blocks), [&](size_t i) {
    const int64_t task = static_cast<int64_t>(i);
    const PackedSequence& sequence = sequences[task / (v_heads_ * blocks)];
    const int64_t head = task / blocks % v_heads_, column = task % blocks * kDeltaColumns;
    const int64_t key_at =
        sequence.first * key_width + head / (v_heads_ / k_heads_) * k_size;
    const int64_t value_at = sequence.first * value_width + head * v_size + column;
    static thread_local ScratchBuffer buffer;
    DeltaScan scan = all;
    scan.tokens = sequence.tokens;
    scan.columns = std::min(kDeltaColumns, v_size - column);
    scan.query += key_at;
    scan.key += key_at;
    scan.value += value_at;
    scan.output += value_at;
    scan.decay += sequence.first * all.decay_stride + head * (all.decay_per_channel ? k_size : 1);
    if (scan.beta != nullptr) scan.beta += sequence.first * v_heads_ + head;
    scan.state += (sequence.slot * v_heads_ + head) * k_size * v_size + column;
    scan.fresh = sequence.fresh;
    scan.scratch = reinterpret_cast<float*>(
        buffer.reserve(static_cast<size_t>(delta_scratch(k_size)) * sizeof(float)));
    kernels_->delta_scan(scan);
  });
  return_pool(pool, pool_out);
}

}  // namespace glmcompile
