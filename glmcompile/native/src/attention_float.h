// The float32 tile kernels over a vector policy; see attention_softmax.h on linkage.
//
// Packed keys: [key / W][channel][W keys]. Packed values: [key][padded_head]. Both products are
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
  static void pack_tile(const void* const* key_rows, const void* const* value_rows, int count,
                        int head_size, PackedTile packed) {
    const int head = padded_head(head_size);
    float* keys = static_cast<float*>(packed.keys);
    float* values = static_cast<float*>(packed.values);
    for (int key = 0; key < count; key += W) {
      float* panel = keys + static_cast<long>(key) * head_size;
      for (int d = 0; d < head_size; d += W) {
        const int channels = head_size - d < W ? head_size - d : W;
        F block[W];
        for (int i = 0; i < W; ++i) block[i] = load<T>(key_rows[key + i], d, channels);
        V::transpose(block);
        for (int i = 0; i < channels; ++i) V::store(panel + (d + i) * W, block[i]);
      }
      for (int i = 0; i < W; ++i) {
        float* row = values + static_cast<long>(key + i) * head;
        for (int d = 0; d < head; d += W) {
          const int channels = head_size - d < W ? head_size - d : W;
          V::store(row + d,
                   channels > 0 ? load<T>(value_rows[key + i], d, channels) : V::set(0.0f));
        }
      }
    }
  }

  static void attend(const AttendTile& task) {
    const int head_size = task.head_size, head = padded_head(head_size);
    int from = kKeyTile, to = 0;
    for (int r = 0; r < task.rows; ++r) {
      if (task.begin[r] >= task.end[r]) continue;
      from = task.begin[r] < from ? task.begin[r] : from;
      to = task.end[r] > to ? task.end[r] : to;
    }
    from = from / W * W;
    to = (to + W - 1) / W * W;
    float* scores = task.scratch;
    const float* keys = static_cast<const float*>(task.tile.keys);
    product(static_cast<const float*>(task.queries.rows), head, keys + static_cast<long>(from) * head_size, head_size * W, W,
            scores + from, kKeyTile, task.rows, (to - from) / W, head_size);
    for (int r = 0; r < task.rows; ++r) {
      float* row = scores + r * kKeyTile;
      softmax_row<V>(row, from, to, task.begin[r], task.end[r], task.bias, task.softcap,
                     task.max + r, task.sum + r, [row](int key, F p) {
                       V::store(row + key, p);
                       return p;
                     });
    }
    const float* values = static_cast<const float*>(task.tile.values);
    product(scores + from, kKeyTile, values + static_cast<long>(from) * head, W, head, task.output,
            head, task.rows, head / W, to - from);
  }

  static void fold(int rows, int head, SoftmaxState tile, SoftmaxState state) {
    fold_tile<V>(rows, head, tile, state);
  }

 private:
  using F = typename V::F;
  static constexpr int W = V::kWidth;

  template <class T>
  static F load(const void* row, int d, int channels) {
    const T* p = static_cast<const T*>(row) + d;
    return channels == W ? V::load(p) : V::load_n(p, channels);
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
  static constexpr AttentionKernels kFloat{K::pack_queries, K::template pack_tile<float>,
                                           K::attend, K::fold};
  static constexpr AttentionKernels kInt8{K::pack_queries, K::template pack_tile<std::int8_t>,
                                          K::attend, K::fold};
  return element == Element::kFloat ? kFloat : kInt8;
}

}  // namespace
}  // namespace glmcompile
