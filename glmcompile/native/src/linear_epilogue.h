// From int32 accumulators to float32 outputs: zero point, scales, bias, activation, residual.
//
// Written once over a vector type V of sixteen lanes (VecPortable, VecAvx2, VecAvx512). Every
// channel goes through the same operations whatever the tile it was computed in, so that a row's
// result does not depend on the other rows of the call.
#pragma once

#include "linear_problem.h"

namespace glmcompile {

// exp(x), x clamped to [-60, 88]: enough for a sigmoid or an error function in float32, and no
// product below becomes subnormal (slow). Relative error below 2e-7 inside the clamp.
// Cody-Waite reduction and the degree-6 polynomial of Cephes' expf.
template <class V>
inline typename V::F vec_exp(typename V::F x) {
  x = V::max(V::min(x, V::set(88.0f)), V::set(-60.0f));
  const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::mul(p, V::pow2(n));
}

// x * sigmoid(-negated): `negated` is minus the sigmoid's argument.
template <class V>
inline typename V::F times_sigmoid(typename V::F x, typename V::F negated) {
  return V::div(x, V::add(V::set(1.0f), vec_exp<V>(negated)));
}

template <class V>
inline typename V::F silu(typename V::F x) {
  return times_sigmoid<V>(x, V::mul(x, V::set(-1.0f)));
}

// x * Phi(x); erfc by Abramowitz and Stegun 7.1.26, whose absolute error is below 1.5e-7.
template <class V>
inline typename V::F gelu(typename V::F x) {
  const auto magnitude = V::max(x, V::mul(x, V::set(-1.0f)));
  const auto z = V::mul(magnitude, V::set(0.70710678118654752f));
  const auto t = V::div(V::set(1.0f), V::fma(z, V::set(0.3275911f), V::set(1.0f)));
  auto p = V::set(1.061405429f);
  p = V::fma(p, t, V::set(-1.453152027f));
  p = V::fma(p, t, V::set(1.421413741f));
  p = V::fma(p, t, V::set(-0.284496736f));
  p = V::fma(p, t, V::set(0.254829592f));
  const auto gauss = vec_exp<V>(V::mul(V::mul(x, x), V::set(-0.5f)));
  const auto half_erfc = V::mul(V::mul(V::mul(p, t), gauss), V::set(0.5f));
  const auto tail = V::mul(x, half_erfc);
  return V::select_negative(x, tail, V::add(x, V::mul(tail, V::set(-1.0f))));
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
inline typename V::F gelu_tanh(typename V::F x) {
  const auto inner = V::fma(V::mul(x, x), V::set(-0.07135481627260025f),
                            V::set(-1.5957691216057308f));
  return times_sigmoid<V>(x, V::mul(x, inner));
}

template <class V>
inline typename V::F quick_gelu(typename V::F x) {
  return times_sigmoid<V>(x, V::mul(x, V::set(-1.702f)));
}

template <class V, Activation kind>
inline typename V::F activate(typename V::F x) {
  if constexpr (kind == Activation::kGelu) return gelu<V>(x);
  if constexpr (kind == Activation::kGeluTanh) return gelu_tanh<V>(x);
  if constexpr (kind == Activation::kQuickGelu) return quick_gelu<V>(x);
  if constexpr (kind == Activation::kSilu) return silu<V>(x);
  return x;
}

// The per-channel constants of one block of 16, zero beyond N.
template <class V>
struct ChannelBlock {
  typename V::I sum;
  typename V::F scale;
  typename V::F bias;

  ChannelBlock(const LinearProblem& p, std::int64_t block) {
    const std::int64_t n = block * kBlockN;
    const std::int64_t left = p.out_features - n;
    if (left >= kBlockN) {
      sum = V::load_int(p.weight_sum + n);
      scale = V::load(p.weight_scale + n);
      bias = p.bias ? V::load(p.bias + n) : V::set(0.0f);
    } else {
      sum = V::load_int_n(p.weight_sum + n, left);
      scale = V::load_n(p.weight_scale + n, left);
      bias = p.bias ? V::load_n(p.bias + n, left) : V::set(0.0f);
    }
  }

  typename V::F apply(const std::int32_t* acc, float row_scale, std::int32_t zero_point) const {
    const auto exact = V::correct(V::load_int(acc), sum, zero_point);
    return V::fma(exact, V::mul(V::set(row_scale), scale), bias);
  }
};

template <class V>
inline void write_block(const LinearProblem& p, std::int64_t row, std::int64_t column,
                        typename V::F y) {
  const std::int64_t left = p.output_width - column;
  const std::int64_t at = row * p.output_width + column;
  if (left >= kBlockN) {
    if (p.residual) y = V::add(y, V::load(p.residual + at));
    V::store(p.output + at, y);
  } else {
    if (p.residual) y = V::add(y, V::load_n(p.residual + at, left));
    V::store_n(p.output + at, y, left);
  }
}

template <class V, Activation kind>
inline void finish_tile_as(const LinearProblem& p, const std::int32_t* acc,
                           std::int64_t acc_stride, std::int64_t row, std::int64_t rows,
                           std::int64_t block, std::int64_t blocks) {
  for (std::int64_t b = 0; b < blocks; ++b) {
    const ChannelBlock<V> channels(p, block + b);
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto y = channels.apply(acc + r * acc_stride + b * kBlockN, p.row_scale[row + r],
                                    p.row_zero_point[row + r]);
      write_block<V>(p, row + r, (block + b) * kBlockN, activate<V, kind>(y));
    }
  }
}

template <class V>
inline void finish_tile_swiglu(const LinearProblem& p, const std::int32_t* acc,
                               std::int64_t acc_stride, std::int64_t row, std::int64_t rows,
                               std::int64_t block, std::int64_t blocks) {
  for (std::int64_t b = 0; b < blocks; b += 2) {
    const ChannelBlock<V> gates(p, block + b);
    const ChannelBlock<V> ups(p, block + b + 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int32_t* at = acc + r * acc_stride + b * kBlockN;
      const float scale = p.row_scale[row + r];
      const std::int32_t zero_point = p.row_zero_point[row + r];
      const auto gate = gates.apply(at, scale, zero_point);
      const auto up = ups.apply(at + kBlockN, scale, zero_point);
      write_block<V>(p, row + r, (block + b) / 2 * kBlockN, V::mul(silu<V>(gate), up));
    }
  }
}

// acc [rows][acc_stride] holds `blocks` blocks of 16 channels from `block` on, rows from `row` on.
template <class V>
inline void finish_tile(const LinearProblem& p, const std::int32_t* acc, std::int64_t acc_stride,
                        std::int64_t row, std::int64_t rows, std::int64_t block,
                        std::int64_t blocks) {
  switch (p.activation) {
    case Activation::kNone:
      return finish_tile_as<V, Activation::kNone>(p, acc, acc_stride, row, rows, block, blocks);
    case Activation::kGelu:
      return finish_tile_as<V, Activation::kGelu>(p, acc, acc_stride, row, rows, block, blocks);
    case Activation::kGeluTanh:
      return finish_tile_as<V, Activation::kGeluTanh>(p, acc, acc_stride, row, rows, block,
                                                      blocks);
    case Activation::kQuickGelu:
      return finish_tile_as<V, Activation::kQuickGelu>(p, acc, acc_stride, row, rows, block,
                                                       blocks);
    case Activation::kSilu:
      return finish_tile_as<V, Activation::kSilu>(p, acc, acc_stride, row, rows, block, blocks);
    case Activation::kSwiglu:
      return finish_tile_swiglu<V>(p, acc, acc_stride, row, rows, block, blocks);
  }
}

}  // namespace glmcompile
