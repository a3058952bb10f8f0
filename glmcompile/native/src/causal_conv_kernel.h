// A depthwise causal convolution over the tokens of one sequence; see recurrent_math.h on linkage.
#pragma once

#include "linear_epilogue.h"
#include "recurrent_math.h"

namespace glmcompile {
namespace {

// Tap j of token t meets token t + j of history and x, one after the other.
template <class V>
void causal_conv(const ConvRows& task) {
  const std::int64_t before = task.kernel - 1;
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    for_vectors<V>(task.channels, [&](std::int64_t c, auto lanes) {
      auto sum = task.bias != nullptr ? lanes.load(task.bias + c) : V::set(0.0f);
      for (std::int64_t j = 0; j < task.kernel; ++j) {
        const float* row = t + j < before ? task.history + (t + j) * kConvChannels
                                          : task.x + (t + j - before) * task.stride;
        sum = V::fma(lanes.load(row + c), V::load(task.taps + j * kConvChannels + c), sum);
      }
      lanes.store(task.output + t * task.stride + c, task.silu ? silu<V>(sum) : sum);
    });
  }
}

}  // namespace
}  // namespace glmcompile
