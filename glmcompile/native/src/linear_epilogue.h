// From int32 accumulators to float32 outputs: zero point, scales, bias, activation, residual.
//
// Written once over a vector type V of sixteen lanes (VecPortable, VecAvx2, VecAvx512). Every
// channel goes through the same operations whatever the tile it was computed in, so that a row's
// result does not depend on the other rows of the call. Every activation is within 3e-7 |x| of the
// exact one.
#pragma once

#include "linear_problem.h"

namespace glmcompile {

// 2^t, t clamped to [-86, 115]: enough for a sigmoid in float32, and nothing computed from it
// becomes subnormal (slow). Relative error below 2e-7 inside the clamp: t = n + r with integral n,
// |r| <= 1/2, and a minimax polynomial for 2^r.
template <class V>
inline typename V::F vec_exp2(typename V::F t) {
  t = V::max(V::min(t, V::set(115.0f)), V::set(-86.0f));
  // Adding 1.5 * 2^23 rounds t to an integer, which is left in the low bits of the sum.
  const auto magic = V::set(12582912.0f);
  const auto shifted = V::add(t, magic);
  const auto r = V::sub(t, V::sub(shifted, magic));
  auto p = V::set(0.001327649224549532f);
  p = V::fma(p, r, V::set(0.00967554934322834f));
  p = V::fma(p, r, V::set(0.05550713464617729f));
  p = V::fma(p, r, V::set(0.24022120237350464f));
  p = V::fma(p, r, V::set(0.6931469440460205f));
  p = V::fma(p, r, V::set(1.0000001192092896f));
  return V::add_exponent(p, shifted);
}

// x / (1 + 2^t).
template <class V>
inline typename V::F over_one_plus_exp2(typename V::F x, typename V::F t) {
  return V::mul(x, V::reciprocal(V::add(V::set(1.0f), vec_exp2<V>(t))));
}

constexpr float kLog2E = 1.44269504088896341f;

template <class V>
inline typename V::F silu(typename V::F x) {
  return over_one_plus_exp2<V>(x, V::mul(x, V::set(-kLog2E)));
}

// x / 2 (1 + erf(x / sqrt 2)); erf by the rational minimax approximation on [-4, 4] that Eigen and
// TensorFlow use, whose absolute error is below 4e-7.
template <class V>
inline typename V::F gelu(typename V::F x) {
  auto z = V::mul(x, V::set(0.70710678118654752f));
  z = V::max(V::min(z, V::set(4.0f)), V::set(-4.0f));
  const auto square = V::mul(z, z);
  auto p = V::set(-2.72614225801306e-10f);
  p = V::fma(p, square, V::set(2.77068142495902e-08f));
  p = V::fma(p, square, V::set(-2.10102402082508e-06f));
  p = V::fma(p, square, V::set(-5.69250639462346e-05f));
  p = V::fma(p, square, V::set(-7.34990630326855e-04f));
  p = V::fma(p, square, V::set(-2.95459980854025e-03f));
  p = V::fma(p, square, V::set(-1.60960333262415e-02f));
  // The denominator of the literature with both signs turned: positive, at least 0.0142.
  auto q = V::set(1.45660718464996e-05f);
  q = V::fma(q, square, V::set(2.13374055278905e-04f));
  q = V::fma(q, square, V::set(1.68282697438203e-03f));
  q = V::fma(q, square, V::set(7.37332916720468e-03f));
  q = V::fma(q, square, V::set(1.42647390514189e-02f));
  const auto erf = V::mul(V::mul(z, V::mul(p, V::set(-1.0f))), V::reciprocal(q));
  const auto half = V::mul(x, V::set(0.5f));
  return V::fma(half, erf, half);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
inline typename V::F gelu_tanh(typename V::F x) {
  constexpr float slope = -1.5957691216057308f * kLog2E;
  const auto inner = V::fma(V::mul(x, x), V::set(slope * 0.044715f), V::set(slope));
  return over_one_plus_exp2<V>(x, V::mul(x, inner));
}

template <class V>
inline typename V::F quick_gelu(typename V::F x) {
  return over_one_plus_exp2<V>(x, V::mul(x, V::set(-1.702f * kLog2E)));
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
