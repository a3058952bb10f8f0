#include "packed_causal_conv.h"

#include <algorithm>

#include "packed_sequences.h"
#include "scratch_buffer.h"

namespace glmcompile {
namespace {

constexpr int64_t kTaskProducts = 64 << 10;

bool is_silu(const std::string& activation) {
  check(activation.empty() || activation == "silu",
        "attribute activation: expected \"\" or silu, got ", activation);
  return !activation.empty();
}

// Columns of `from`, `columns` of them to a row and as far apart, as rows kConvChannels apart.
void to_rows(const float* from, int64_t channels, int64_t columns, float* to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < columns; ++j) to[j * kConvChannels + c] = from[c * columns + j];
}

// The last kernel - 1 tokens of history and x.
void keep_last(const ConvRows& rows, float* state) {
  const int64_t before = rows.kernel - 1;
  for (int64_t j = 0; j < before; ++j) {
    const int64_t token = rows.tokens + j;
    const float* row = token < before ? rows.history + token * kConvChannels
                                      : rows.x + (token - before) * rows.stride;
    for (int64_t c = 0; c < rows.channels; ++c) state[c * before + j] = row[c];
  }
}

}  // namespace

PackedCausalConv::PackedCausalConv(const KernelInfo& info)
    : silu_(is_silu(info.attribute<std::string>("activation", ""))),
      kernels_(&recurrent_kernels(selected_isa())) {}

void PackedCausalConv::compute(KernelContext& context) const {
  const Tensor x = context.input(kX), weight = context.input(kWeight), bias = context.input(kBias),
               pool = context.input(kState);
  check(x.rank() == 2, "x: expected [tokens, channels], got ", x.shape_text());
  const int64_t tokens = x.dim(0), channels = x.dim(1);
  check(weight.rank() == 2 && weight.dim(0) == channels && weight.dim(1) >= 2,
        "weight: expected [", channels, ", kernel] with a kernel of at least 2, got ",
        weight.shape_text());
  const int64_t kernel = weight.dim(1), before = kernel - 1;
  if (bias) expect_shape(bias, {channels});
  check(pool.rank() == 3 && pool.dim(1) == channels && pool.dim(2) == before,
        "state: expected [slots, ", channels, ", ", before, "], got ", pool.shape_text());
  const std::vector<PackedSequence> sequences =
      read_sequences(context.input(kSlots), context.input(kCumulative), context.input(kPast),
                     tokens, pool.dim(0));

  const float *in = x.data<float>(), *w = weight.data<float>();
  const float* b = bias ? bias.data<float>() : nullptr;
  float* states = pool.data<float>();
  float* out = context.output(0, x.shape(), 2).data<float>();
  const Tensor pool_out = context.output(1, pool.shape(), 3);

  const int64_t blocks = (channels + kConvChannels - 1) / kConvChannels;
  const int64_t products = tokens * kConvChannels * kernel;
  const int64_t group = std::max<int64_t>(kTaskProducts / std::max<int64_t>(products, 1), 1);
  context.parallel_for(static_cast<size_t>((blocks + group - 1) / group), [&](size_t task) {
    static thread_local ScratchBuffer buffer;
    float* taps = reinterpret_cast<float*>(
        buffer.reserve(static_cast<size_t>(kernel + before) * kConvChannels * sizeof(float)));
    float* history = taps + kernel * kConvChannels;
    const int64_t first_block = static_cast<int64_t>(task) * group;
    const int64_t last = std::min((first_block + group) * kConvChannels, channels);
    for (int64_t first = first_block * kConvChannels; first < last; first += kConvChannels) {
      const int64_t count = std::min(kConvChannels, channels - first);
      to_rows(w + first * kernel, count, kernel, taps);
      for (const PackedSequence& sequence : sequences) {
        float* state = states + (sequence.slot * channels + first) * before;
        if (sequence.fresh) std::fill(history, history + before * kConvChannels, 0.0f);
        else to_rows(state, count, before, history);
        ConvRows rows{};
        rows.tokens = sequence.tokens;
        rows.channels = count;
        rows.kernel = kernel;
        rows.x = in + sequence.first * channels + first;
        rows.output = out + sequence.first * channels + first;
        rows.stride = channels;
        rows.history = history;
        rows.taps = taps;
        rows.bias = b != nullptr ? b + first : nullptr;
        rows.silu = silu_;
        kernels_->causal_conv(rows);
        keep_last(rows, state);
      }
    }
  });
  return_pool(pool, pool_out);
}

}  // namespace glmcompile
