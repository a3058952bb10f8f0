// The float32 tile kernels over a vector policy; see attention_softmax.h on linkage.
//
// Packed keys: [key / W][channel][W keys]. Packed values: [key][padded channels]. Both products are
// then the same register-blocked loop: broadcast an element of the left matrix, multiply it with
// vectors of the right one.
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "attention_softmax.h"

namespace glmcompile {
namespace {

template <class V>
class FloatKernels {
 public:
  static void pack_queries(const float* const* rows, int count, int head_size,
                           const float* channel_scale, PackedQueries packed) {
    float* out = static_cast<float*>(packed.rows);
    for (int r = 0; r < count; ++r, out += padded_head(head_size))
      for (int d = 0; d < head_size; ++d) out[d] = rows[r][d] * channel_scale[d];
  }

  template <class T>
  static void pack_tile(const TileRows& rows, const TileRows& ahead, HeadSizes head,
                        PackedTile packed) {
    const int width = padded_head(head.value);
    float* keys = static_cast<float*>(packed.keys);
    float* values = static_cast<float*>(packed.values);
    for (int key = 0; key < rows.padded; key += W) {
      if (key < ahead.padded) prefetch_rows(ahead, key, key + W, head, sizeof(T));
      float* panel = keys + static_cast<long>(key) * head.key;
      for (int d = 0; d < head.key; d += W) {
        const int channels = head.key - d < W ? head.key - d : W;
        F block[W];
        for (int i = 0; i < W; ++i) block[i] = load<T>(rows.keys[key + i], d, channels);
        V::transpose(block);
        for (int i = 0; i < channels; ++i) V::store(panel + (d + i) * W, block[i]);
      }
      for (int i = 0; i < W; ++i) {
        float* row = values + static_cast<long>(key + i) * width;
        for (int d = 0; d < width; d += W) {
          const int channels = head.value - d < W ? head.value - d : W;
          V::store(row + d,
                   channels > 0 ? load<T>(rows.values[key + i], d, channels) : V::set(0.0f));
        }
      }
    }
  }

  static void attend(const AttendTile& task) {
    const int channels = task.head.key, width = padded_head(task.head.value);
    const auto [from, to] = key_range<V>(task);
    float* scores = task.scratch;
    const float* keys = static_cast<const float*>(task.tile.keys);
    product(static_cast<const float*>(task.queries.rows), padded_head(channels),
            keys + static_cast<long>(from) * channels, channels * W, W, scores + from,
            kKeyTile, task.rows, (to - from) / W, channels);
    softmax(task, from, to);
    const float* values = static_cast<const float*>(task.tile.values);
    product(scores + from, kKeyTile, values + static_cast<long>(from) * width, W, width,
            task.part.output, width, task.rows, width / W, to - from);
    fold_tile<V>(task.rows, width, task.part, task.state);
  }

  template <class T>
  static void attend_unpacked(const AttendTile& task, const TileRows& rows,
                              const TileRows& ahead) {
    switch (task.rows) {
      case 1: return attend_few<T, 1>(task, rows, ahead);
      case 2: return attend_few<T, 2>(task, rows, ahead);
      case 3: return attend_few<T, 3>(task, rows, ahead);
      default: return attend_few<T, 4>(task, rows, ahead);
    }
  }

  static void fold(int rows, int width, SoftmaxState tile, SoftmaxState state) {
    fold_tile<V>(rows, width, tile, state);
  }

 private:
  using F = typename V::F;
  static constexpr int W = V::kWidth;

  template <class T>
  static F load(const void* row, int d, int channels) {
    const T* p = static_cast<const T*>(row) + d;
    return channels == W ? V::load(p) : V::load_n(p, channels);
  }

  static void softmax(const AttendTile& task, int from, int to) {
    for (int r = 0; r < task.rows; ++r) {
      float* row = task.scratch + r * kKeyTile;
      softmax_row<V>(row, from, to, RowMask(task, r, 1.0f), task.part.max + r, task.part.sum + r,
                     [row](int key, F p) {
                       V::store(row + key, p);
                       return p;
                     });
    }
  }

  // The sums of `attend`, in the same order, without packed keys and values in between.
  template <class T, int R>
  static void attend_few(const AttendTile& task, const TileRows& rows, const TileRows& ahead) {
    const int channels = task.head.key, head = padded_head(channels);
    const auto [from, to] = key_range<V>(task);
    const float* queries = static_cast<const float*>(task.queries.rows);
    for (int key = from; key < to; key += W) {
      if (key < ahead.padded) prefetch_rows(ahead, key, key + W, task.head, sizeof(T));
      F sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = V::set(0.0f);
      int d = 0;
      for (; d + W <= channels; d += W)
        score_channels<T, R, W>(queries + d, head, rows.keys + key, d, sum);
      if (d < channels) score_channels<T, R, 8>(queries + d, head, rows.keys + key, d, sum);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) V::store(task.scratch + r * kKeyTile + key, sum[r]);
    }
    softmax(task, from, to);
    constexpr int N = V::kVectors;
    const int size = task.head.value, width = padded_head(size);
    int d = 0;
    for (; d + N * W <= size; d += N * W) mix_values<T, R, N>(task, rows.values, from, to, d);
    for (; d < size; d += W) mix_values<T, R, 1>(task, rows.values, from, to, d);
    for (; d < width; d += W)
      for (int r = 0; r < R; ++r) V::store(task.part.output + r * width + d, V::set(0.0f));
    fold_tile<V>(R, width, task.part, task.state);
  }

  // Adds channels [d, d + C) of W keys to their scores.
  template <class T, int R, int C>
  static inline __attribute__((always_inline)) void score_channels(const float* queries, int head,
                                                                   const void* const* keys, int d,
                                                                   F* sum) {
    F channel[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) channel[i] = load<T>(keys[i], d, C < W ? C : W);
    V::transpose(channel);
#pragma GCC unroll 16
    for (int i = 0; i < (C < W ? C : W); ++i)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sum[r] = V::fma(V::set(queries[r * head + i]), channel[i], sum[r]);
  }

  // output[r][d ...] = sum over keys of probability * value, for N vectors of channels.
  template <class T, int R, int N>
  static void mix_values(const AttendTile& task, const void* const* values, int from, int to,
                         int d) {
    const int width = padded_head(task.head.value), left = task.head.value - d - (N - 1) * W;
    const int last = left < W ? left : W;
    F sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[r][j] = V::set(0.0f);
    for (int key = from; key < to; ++key) {
      F right[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        right[j] = load<T>(values[key], d + j * W, j + 1 < N ? W : last);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F left = V::set(task.scratch[r * kKeyTile + key]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) V::store(task.part.output + r * width + d + j * W, sum[r][j]);
  }

  // c[r][j] = sum over k of a[r * lda + k] * b[j * b_vector + k * b_step], in ascending k, for a
  // block of R rows and N vectors.
  template <int R, int N>
  static void block(const float* a, int lda, const float* b, int b_vector, int b_step, float* c,
                    int ldc, int depth) {
    F sum[R][N];  // in registers only once every loop over it is unrolled
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[r][j] = V::set(0.0f);
    for (int k = 0; k < depth; ++k, b += b_step) {
      F right[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) right[j] = V::load(b + j * b_vector);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F left = V::set(a[r * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) V::store(c + r * ldc + j * W, sum[r][j]);
  }

  template <int N>
  static void columns(const float* a, int lda, const float* b, int b_vector, int b_step, float* c,
                      int ldc, int rows, int depth) {
    constexpr int R = V::kRows;
    for (; rows >= R; rows -= R, a += R * lda, c += R * ldc)
      block<R, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
    switch (rows) {
      case 1: return block<1, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
      case 2: return block<2, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
      case 3: return block<3, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
      case 4: return block<4, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
      case 5: return block<5, N>(a, lda, b, b_vector, b_step, c, ldc, depth);
      default: return;
    }
  }

  static void product(const float* a, int lda, const float* b, int b_vector, int b_step, float* c,
                      int ldc, int rows, int vectors, int depth) {
    constexpr int N = V::kVectors;
    for (; vectors >= N; vectors -= N, b += N * b_vector, c += N * W)
      columns<N>(a, lda, b, b_vector, b_step, c, ldc, rows, depth);
    for (; vectors > 0; --vectors, b += b_vector, c += W)
      columns<1>(a, lda, b, b_vector, b_step, c, ldc, rows, depth);
  }
};

template <class V>
const AttentionKernels& float_kernels(Element element) {
  using K = FloatKernels<V>;
  static constexpr AttentionKernels kFloat{4, kMaxHeadSize, K::pack_queries,
                                           K::template pack_tile<float>, K::attend,
                                           K::template attend_unpacked<float>, K::fold, nullptr};
  static constexpr AttentionKernels kInt8{4, kMaxHeadSize, K::pack_queries,
                                          K::template pack_tile<std::int8_t>, K::attend,
                                          K::template attend_unpacked<std::int8_t>, K::fold,
                                          nullptr};
  return element == Element::kFloat ? kFloat : kInt8;
}

}  // namespace
}  // namespace glmcompile
