// Softmax of score tiles and folding of tiles, over a vector policy (attention_vec_*.h).
//
// Everything here has internal linkage: each translation unit compiles it for its own instruction
// set, and the linker must not exchange one for another.
#pragma once

#include "attention_kernels.h"

namespace glmcompile {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// 2^x for x <= 0, relative error below 2e-7; exactly 1 at 0 and exactly 0 from -127 on.
// Minimax polynomial of degree 5 for the fraction, in [-1/2, 1/2].
template <class V>
inline typename V::F exp2(typename V::F x) {
  const typename V::F f = V::fraction(x);
  typename V::F p = V::set(1.327647198e-03f);
  p = V::fma(p, f, V::set(9.675541334e-03f));
  p = V::fma(p, f, V::set(5.550713274e-02f));
  p = V::fma(p, f, V::set(2.402211972e-01f));
  p = V::fma(p, f, V::set(6.931469671e-01f));
  p = V::fma(p, f, V::set(1.0f));
  return V::times_pow2(p, x);
}

// cap * tanh(x / cap) for scores in the base-2 domain.
template <class V>
inline typename V::F soft_cap(typename V::F x, float cap) {
  // tanh(u) = (1 - e) / (1 + e) with e = exp(-2|u|), and the sign of u.
  const typename V::F u = V::mul(x, V::set(1.0f / cap));
  const typename V::F size = V::max(u, V::sub(V::set(0.0f), u));
  const typename V::F e = exp2<V>(V::mul(size, V::set(-2.8853900817779268f)));
  const typename V::F one = V::set(1.0f);
  const typename V::F tanh = V::div(V::sub(one, e), V::add(one, e));
  const typename V::F sign = V::div(u, V::max(size, V::set(1e-30f)));
  return V::mul(V::mul(tanh, sign), V::set(cap));
}

// Asks for keys and values [first, last). They lie a whole token apart, which hardware prefetchers
// do not follow.
inline void prefetch_rows(const TileRows& rows, int first, int last, HeadSizes head,
                          int element_size) {
  for (int i = first; i < last; ++i) {
    for (int line = 0; line < head.key * element_size; line += 64)
      __builtin_prefetch(static_cast<const char*>(rows.keys[i]) + line, 0, 2);
    for (int line = 0; line < head.value * element_size; line += 64)
      __builtin_prefetch(static_cast<const char*>(rows.values[i]) + line, 0, 2);
  }
}

struct KeyRange {
  int from, to;
};

// The keys any row attends, widened to whole vectors.
template <class V>
inline KeyRange key_range(const AttendTile& task) {
  constexpr int W = V::kWidth;
  int from = kKeyTile, to = 0;
  for (int r = 0; r < task.rows; ++r) {
    if (task.begin[r] >= task.end[r]) continue;
    from = task.begin[r] < from ? task.begin[r] : from;
    to = task.end[r] > to ? task.end[r] : to;
  }
  return {from / W * W, (to + W - 1) / W * W};
}

// What happens to one row of scores before softmax, see AttendTile.
struct RowMask {
  // unit: of the row's scores, in the base-2 domain.
  RowMask(const AttendTile& task, int row, float unit)
      : begin(task.begin[row]),
        end(task.end[row]),
        bias(task.bias),
        cap(task.softcap / unit),
        slope(task.slope != nullptr ? task.slope[row] / unit : 0.0f),
        distance(task.slope != nullptr ? task.distance[row] : 0.0f) {}
  int begin, end;
  const float* bias;
  float cap, slope, distance;
};

struct KeyNumbers {
  constexpr KeyNumbers() : of() {
    for (int key = 0; key < kKeyTile; ++key) of[key] = static_cast<float>(key);
  }
  float of[kKeyTile];
};
constexpr KeyNumbers kKeyNumbers;

// Applies cap, slope and bias to one row of scores of keys [from, to), multiples of the vector
// width, sets those outside [begin, end) to -inf, and returns the largest.
template <class V>
inline float mask_scores(float* scores, int from, int to, const RowMask& mask) {
  constexpr int kWidth = V::kWidth;
  const int begin = mask.begin, end = mask.end;
  const float *bias = mask.bias, cap = mask.cap, slope = mask.slope;
  typename V::F top = V::set(kMinusInfinity);
  if (cap == 0 && slope == 0 && bias == nullptr && from >= begin && to <= end) {
    for (int key = from; key < to; key += kWidth) top = V::max(top, V::load(scores + key));
    return V::reduce_max(top);
  }
  for (int key = from; key < to; key += kWidth) {
    typename V::F s = V::load(scores + key);
    if (cap > 0) s = soft_cap<V>(s, cap);
    if (slope != 0) {
      // Whole numbers, exact: the same distance whatever tile or vector the key is in.
      const typename V::F d = V::add(V::load(kKeyNumbers.of + key), V::set(mask.distance));
      s = V::fma(V::set(slope), d, s);
    }
    if (bias != nullptr) s = V::add(s, V::load(bias + key));
    if (key < begin || key + kWidth > end) {
      const int low = begin - key, high = end - key;
      const int first = low < 0 ? 0 : (low > kWidth ? kWidth : low);
      const int last = high < 0 ? 0 : (high > kWidth ? kWidth : high);
      s = V::keep(s, first, last);
    }
    V::store(scores + key, s);
    top = V::max(top, s);
  }
  return V::reduce_max(top);
}

// Turns one row of scores into probabilities relative to its maximum over the mask's keys, all
// within [from, to), multiples of the vector width; the other keys of [from, to) get 0.
// write(key, p) stores a vector of probabilities and returns what the row's sum shall count.
template <class V, class Write>
inline void softmax_row(float* scores, int from, int to, const RowMask& mask, float* max,
                        float* sum, const Write& write) {
  constexpr int kWidth = V::kWidth;
  const float row_max = mask_scores<V>(scores, from, to, mask);
  typename V::F total = V::set(0.0f);
  if (row_max == kMinusInfinity) {
    for (int key = from; key < to; key += kWidth) write(key, total);
  } else {
    const typename V::F shift = V::set(row_max);
    for (int key = from; key < to; key += kWidth)
      total = V::add(total, write(key, exp2<V>(V::sub(V::load(scores + key), shift))));
  }
  *max = row_max;
  *sum = V::reduce_add(total);
}

// What the state and a tile are multiplied with when they are folded, by row, in whole vectors. A
// tile without keys leaves the state as it is.
template <class V>
inline void fold_factors(int rows, const float* tile_max, const float* state_max, float* old,
                         float* fresh) {
  const typename V::F lowest = V::set(-0x1p100f);  // -inf is at no distance from itself
  for (int r = 0; r < rows; r += V::kWidth) {
    const typename V::F a = V::max(V::load(state_max + r), lowest);
    const typename V::F b = V::max(V::load(tile_max + r), lowest);
    const typename V::F top = V::max(a, b);
    V::store(old + r, exp2<V>(V::sub(a, top)));
    V::store(fresh + r, exp2<V>(V::sub(b, top)));
  }
}

inline void fold_sums(int rows, const float* tile_max, const float* tile_sum, const float* old,
                      const float* fresh, SoftmaxState state) {
  for (int r = 0; r < rows; ++r) {
    state.max[r] = tile_max[r] > state.max[r] ? tile_max[r] : state.max[r];
    state.sum[r] = state.sum[r] * old[r] + tile_sum[r] * fresh[r];
  }
}

template <class V>
inline typename V::F fold_vector(typename V::F state, typename V::F tile, typename V::F old,
                                 typename V::F fresh) {
  return V::fma(tile, fresh, V::mul(state, old));
}

template <class V>
void fold_tile(int rows, int width, SoftmaxState tile, SoftmaxState state) {
  constexpr int kRows = 32;  // whose factors are computed together: one row's would be waited for
  for (int first = 0; first < rows; first += kRows) {
    const int count = rows - first < kRows ? rows - first : kRows;
    alignas(64) float old[kRows], fresh[kRows];
    fold_factors<V>(count, tile.max + first, state.max + first, old, fresh);
    fold_sums(count, tile.max + first, tile.sum + first, old, fresh,
              {state.max + first, state.sum + first, nullptr});
    for (int i = 0; i < count; ++i) {
      if (tile.max[first + i] == kMinusInfinity) continue;
      float* out = state.output + static_cast<long>(first + i) * width;
      const float* in = tile.output + static_cast<long>(first + i) * width;
      const typename V::F a = V::set(old[i]), b = V::set(fresh[i]);
      for (int d = 0; d < width; d += V::kWidth)
        V::store(out + d, fold_vector<V>(V::load(out + d), V::load(in + d), a, b));
    }
  }
}

}  // namespace
}  // namespace glmcompile
