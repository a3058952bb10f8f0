// The gated delta rule over the tokens of one sequence; see recurrent_math.h on linkage.
//
//   S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
//
// Yang, Kautz, Hatamizadeh: Gated Delta Networks (2024), the recurrent form; with a decay for each
// channel of the key, Kimi Linear (2025).
#pragma once

#include "recurrent_math.h"

namespace glmcompile {
namespace {

template <class V, int kVectors>
class GatedDelta {
 public:
  // All but the first and the last token find and leave the state in scratch memory: in a pool, its
  // rows lie so far apart that they would take each other's place in the L1 cache.
  static void scan(const DeltaScan& task) {
    const std::int64_t padded = padded_to_lanes(task.k_size);
    float *query = task.scratch, *key = query + padded, *decay = key + padded,
          *decayed_key = decay + padded;
    const Rows local{decayed_key + padded, kDeltaColumns}, pool{task.state, task.v_size};
    if (task.fresh)
      for (std::int64_t i = 0; i < task.k_size * kDeltaColumns; i += kLanes)
        V::store(local.data + i, V::set(0.0f));

    for (std::int64_t t = 0; t < task.tokens; ++t) {
      normalize(task, task.query + t * task.key_stride, task.scale, query);
      normalize(task, task.key + t * task.key_stride, 1.0f, key);
      const float* logarithms = task.decay + t * task.decay_stride;
      for_vectors<V>(task.k_size, [&](std::int64_t i, auto lanes) {
        const F factor =
            exp<V>(task.decay_per_channel ? lanes.load(logarithms + i) : V::set(*logarithms));
        V::store(decay + i, factor);
        V::store(decayed_key + i, V::mul(factor, V::load(key + i)));
      });
      const Token token{task.k_size, query, key, decay, decayed_key,
                        t > 0 || task.fresh ? local : pool,
                        t + 1 < task.tokens ? local : pool,
                        task.value + t * task.value_stride,
                        task.output + t * task.value_stride,
                        task.beta != nullptr ? task.beta + t * task.beta_stride : nullptr};

      std::int64_t column = 0;
      for (; column + kVectors * kLanes <= task.columns; column += kVectors * kLanes)
        step<kVectors>(token, column, AllLanes<V>{});
      for_vectors<V>(task.columns - column,
                     [&](std::int64_t i, auto lanes) { step<1>(token, column + i, lanes); });
    }
  }

 private:
  using F = typename V::F;

  struct Rows {
    float* data;
    std::int64_t stride;
  };

  struct Token {
    std::int64_t k_size;
    const float *query, *key, *decay, *decayed_key;  // [k_size]
    Rows from, to;                                   // the state before and after
    const float* value;
    float* output;
    const float* beta;
  };

  // As transformers' l2norm: the root is of the sum, not the mean, of squares.
  static void normalize(const DeltaScan& task, const float* in, float scale, float* out) {
    if (task.l2norm_epsilon > 0) {
      F squares = V::set(0.0f);
      for_vectors<V>(task.k_size, [&](std::int64_t i, auto lanes) {
        const F x = lanes.load(in + i);
        squares = V::fma(x, x, squares);
      });
      scale /= __builtin_sqrtf(V::reduce_sum(squares) + task.l2norm_epsilon);
    }
    for_vectors<V>(task.k_size, [&](std::int64_t i, auto lanes) {
      V::store(out + i, V::mul(lanes.load(in + i), V::set(scale)));
    });
  }

  template <int N, class Lanes>
  static void step(const Token& token, std::int64_t column, Lanes lanes) {
    const float* from = token.from.data + column;
    F change[N];  // of what the key recalls
    for (int n = 0; n < N; ++n) change[n] = lanes.load(token.value + column + n * kLanes);
    if (token.beta != nullptr) {
      F recalled[N];
      for (int n = 0; n < N; ++n) recalled[n] = V::set(0.0f);
      for (std::int64_t k = 0; k < token.k_size; ++k) {
        const F key = V::set(token.decayed_key[k]);
        const float* row = from + k * token.from.stride;
        for (int n = 0; n < N; ++n)
          recalled[n] = V::fma(lanes.load(row + n * kLanes), key, recalled[n]);
      }
      const F beta = V::set(*token.beta);
      for (int n = 0; n < N; ++n) change[n] = V::mul(V::sub(change[n], recalled[n]), beta);
    }

    F output[N];
    for (int n = 0; n < N; ++n) output[n] = V::set(0.0f);
    for (std::int64_t k = 0; k < token.k_size; ++k) {
      const F decay = V::set(token.decay[k]), key = V::set(token.key[k]),
              query = V::set(token.query[k]);
      const float* row = from + k * token.from.stride;
      float* updated = token.to.data + column + k * token.to.stride;
      for (int n = 0; n < N; ++n) {
        const F state = V::fma(key, change[n], V::mul(lanes.load(row + n * kLanes), decay));
        lanes.store(updated + n * kLanes, state);
        output[n] = V::fma(state, query, output[n]);
      }
    }
    for (int n = 0; n < N; ++n) lanes.store(token.output + column + n * kLanes, output[n]);
  }
};

}  // namespace
}  // namespace glmcompile
