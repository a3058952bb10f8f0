// The selective state space recurrence over the tokens of one sequence; see recurrent_math.h on
// linkage.
//
//   dt <- clamp(softplus(dt + bias));  h <- exp(dt A) h + dt x B^T;  y = h C + D x
//
// Gu, Dao: Mamba (2023); Dao, Gu: Transformers are SSMs (2024), Mamba-2, where A is a number.
#pragma once

#include "recurrent_math.h"

namespace glmcompile {
namespace {

template <class V>
class Mamba {
 public:
  static void scan(const MambaScan& task) {
    float *step = task.scratch, *decay = step + padded_to_lanes(task.heads);
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      discretize(task, task.dt + t * task.dt_stride, step, decay);
      for (std::int64_t h = 0; h < task.heads; ++h) {
        const std::int64_t group = (task.first_head + h) / task.heads_per_group;
        const std::int64_t at = t * task.bc_stride + group * task.state_size;
        const std::int64_t rows = t * task.x_stride + h * task.head_size;
        const Head head{task.state_size, step[h], decay[h],
                        task.a_per_state ? task.a + h * task.state_size : nullptr,
                        task.b + at, task.c + at, task.d != nullptr ? task.d[h] : 0.0f};
        float* state = task.state + h * task.head_size * task.state_size;
        std::int64_t p = 0;
        for (; p + kRows <= task.head_size; p += kRows)
          advance<kRows>(head, task.x + rows + p, state + p * task.state_size,
                         task.output + rows + p);
        for (; p < task.head_size; ++p)
          advance<1>(head, task.x + rows + p, state + p * task.state_size, task.output + rows + p);
      }
    }
  }

 private:
  using F = typename V::F;

  // Of a head's state, whose sums do not wait for each other.
  static constexpr int kRows = 4;

  struct Head {
    std::int64_t state_size;
    float step, decay;
    const float* a;  // [state_size], or null: `decay` is for all
    const float *b, *c;
    float d;
  };

  static void discretize(const MambaScan& task, const float* dt, float* step, float* decay) {
    for_vectors<V>(task.heads, [&](std::int64_t h, auto lanes) {
      F x = lanes.load(dt + h);
      if (task.dt_bias != nullptr) x = V::add(x, lanes.load(task.dt_bias + h));
      if (task.dt_softplus) x = softplus<V>(x);
      x = V::max(V::set(task.dt_min), V::min(V::set(task.dt_max), x));
      V::store(step + h, x);
      if (!task.a_per_state) V::store(decay + h, exp<V>(V::mul(x, lanes.load(task.a + h))));
    });
  }

  // R rows of the state by one token.
  template <int R>
  static void advance(const Head& head, const float* x, float* state, float* output) {
    F input[R], sum[R];
    for (int r = 0; r < R; ++r) {
      input[r] = V::set(head.step * x[r]);
      sum[r] = V::set(0.0f);
    }
    for_vectors<V>(head.state_size, [&](std::int64_t i, auto lanes) {
      const F b = lanes.load(head.b + i), c = lanes.load(head.c + i);
      const F decay = head.a != nullptr
                          ? exp<V>(V::mul(V::set(head.step), lanes.load(head.a + i)))
                          : V::set(head.decay);
      for (int r = 0; r < R; ++r) {
        float* row = state + r * head.state_size + i;
        const F updated = V::fma(input[r], b, V::mul(lanes.load(row), decay));
        lanes.store(row, updated);
        sum[r] = V::fma(updated, c, sum[r]);
      }
    });
    for (int r = 0; r < R; ++r) output[r] = V::reduce_sum(sum[r]) + head.d * x[r];
  }
};

}  // namespace
}  // namespace glmcompile
