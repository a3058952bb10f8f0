#include "packed_causal_conv.h"

#include <algorithm>
#include <type_traits>

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

// Makes the history that of the token after the last: the last kernel - 1 of history and x.
void move_on(const ConvRows& rows, float* history) {
  const int64_t before = rows.kernel - 1;
  for (int64_t j = 0; j < before; ++j) {
    const int64_t token = rows.tokens + j;
    const float* row = token < before ? history + token * kConvChannels
                                      : rows.x + (token - before) * rows.stride;
    std::copy(row, row + rows.channels, history + j * kConvChannels);
  }
}

// Columns of `from`, which has `columns` of them, to rows kConvChannels apart.
inline void to_rows(const float* __restrict from, int64_t channels, int64_t columns,
                    float* __restrict to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < columns; ++j) to[j * kConvChannels + c] = from[c * columns + j];
}

inline void to_columns(const float* __restrict from, int64_t channels, int64_t columns,
                       float* __restrict to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < columns; ++j) to[c * columns + j] = from[j * kConvChannels + c];
}

// transpose(columns) where compilers know the usual numbers of columns and shuffle whole vectors.
template <class Transpose>
void with_known_columns(int64_t columns, const Transpose& transpose) {
  if (columns == 2) transpose(std::integral_constant<int64_t, 2>{});
  else if (columns == 3) transpose(std::integral_constant<int64_t, 3>{});
  else if (columns == 4) transpose(std::integral_constant<int64_t, 4>{});
  else transpose(columns);
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
      with_known_columns(kernel, [&](auto columns) {
        to_rows(w + first * kernel, count, columns, taps);
      });
      for (const PackedSequence& sequence : sequences) {
        float* state = states + (sequence.slot * channels + first) * before;
        if (sequence.fresh) std::fill(history, history + before * kConvChannels, 0.0f);
        else with_known_columns(before, [&](auto columns) {
          to_rows(state, count, columns, history);
        });
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
        move_on(rows, history);
        with_known_columns(before, [&](auto columns) {
          to_columns(history, count, columns, state);
        });
      }
    }
  });
  return_pool(pool, pool_out);
}

}  // namespace glmcompile
