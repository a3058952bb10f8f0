// Tile kernels with 16-bit fixed-point products: AVX-512 VNNI, twice the rate of float32 FMA.
//
// vpdpwssd multiplies pairs of int16 and adds them to int32, exactly. Each query and, for float
// tiles, each key and each value channel has a scale of its own. The ranges are such that no sum
// can leave int32: query * key * kMaxHeadSize and probability * value * kKeyTile stay below 2^31.
//
// Packed keys: [key / 16][channel / 2][16 keys][2 channels]; packed values:
// [key / 2][padded_head][2 keys]; queries and probabilities: pairs of int16, rows as far apart as
// their float counterparts.

#include "attention_kernels.h"
#include "attention_softmax.h"
#include "attention_vec_avx512.h"

namespace glmcompile {
namespace {

using V = VecAvx512;
constexpr int W = V::kWidth;

// An int8 cache: keys and values are exact, so queries and probabilities use all 16 bits.
struct Int8Tile {
  using Stored = std::int8_t;
  static constexpr float kQuery = 32767, kProbability = 32767;
  static constexpr bool kScaled = false;
};
// Float keys and values are rounded to 12 bits with the tile.
struct FloatTile {
  using Stored = float;
  static constexpr float kQuery = 4095, kKey = 2047, kProbability = 8191, kValue = 2047;
  static constexpr bool kScaled = true;
};

__mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }

__m512 load_floats(const float* p, int n) {
  return n > 0 ? _mm512_maskz_loadu_ps(first_lanes(n), p) : _mm512_setzero_ps();
}

float largest(const float* p, int n) {
  __m512 top = _mm512_setzero_ps();
  for (int d = 0; d < n; d += W) top = _mm512_max_ps(top, _mm512_abs_ps(load_floats(p + d, n - d)));
  return _mm512_reduce_max_ps(top);
}

// 32 floats times `factor` as int16.
__m512i round_to_int16(__m512 low, __m512 high, __m512 factor) {
  const __m256i a = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(low, factor)));
  const __m256i b = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(high, factor)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// Channels [d, d + 32) of a key as int16, zero from head_size on.
__m512i key_channels(const std::int8_t* row, int d, int head_size, float) {
  const int n = head_size - d;
  const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, row + d));
}
__m512i key_channels(const float* row, int d, int head_size, float factor) {
  return round_to_int16(load_floats(row + d, head_size - d),
                        load_floats(row + d + W, head_size - d - W), _mm512_set1_ps(factor));
}

// sum += a . b over pairs of int16. Written as assembly since GCC copies the accumulators of the
// intrinsic through other registers and memory in every step of a register-blocked loop.
inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

template <class Tile>
class FixedKernels {
 public:
  using Stored = typename Tile::Stored;

  static void pack_queries(const float* const* rows, int count, int head_size,
                           const float* channel_scale, PackedQueries packed) {
    const int head = padded_head(head_size);
    for (int r = 0; r < count; ++r) {
      alignas(64) float query[kMaxHeadSize] = {};
      for (int d = 0; d < head_size; ++d) query[d] = rows[r][d] * channel_scale[d];
      const float top = largest(query, head);
      packed.scale[r] = top / Tile::kQuery;
      const __m512 factor = _mm512_set1_ps(top > 0 ? Tile::kQuery / top : 0.0f);
      std::int32_t* out = static_cast<std::int32_t*>(packed.rows) + static_cast<long>(r) * head;
      for (int d = 0; d < head; d += 2 * W)
        _mm512_storeu_si512(out + d / 2, round_to_int16(_mm512_load_ps(query + d),
                                                        _mm512_load_ps(query + d + W), factor));
    }
  }

  static void pack_tile(const void* const* key_rows, const void* const* value_rows, int count,
                        int head_size, PackedTile packed) {
    pack_keys(key_rows, count, head_size, packed);
    pack_values(value_rows, count, head_size, packed);
  }

  static void attend(const AttendTile& task) {
    const int head = padded_head(task.head_size);
    int from = kKeyTile, to = 0;
    for (int r = 0; r < task.rows; ++r) {
      if (task.begin[r] >= task.end[r]) continue;
      from = task.begin[r] < from ? task.begin[r] : from;
      to = task.end[r] > to ? task.end[r] : to;
    }
    from = from / W * W;
    to = (to + W - 1) / W * W;

    const std::int32_t* keys =
        static_cast<const std::int32_t*>(task.tile.keys) + static_cast<long>(from) * (head / 2);
    const float* query_scale = task.queries.scale;
    const float* key_scale = task.tile.key_scale + from;
    product(static_cast<const std::int32_t*>(task.queries.rows), head, keys, W * (head / 2), W,
            task.scratch + from, kKeyTile, task.rows, (to - from) / W, head / 2,
            [&](int row, int column, __m512 dot) {
              dot = _mm512_mul_ps(dot, _mm512_set1_ps(query_scale[row]));
              return Tile::kScaled ? _mm512_mul_ps(dot, V::load(key_scale + column)) : dot;
            });
    for (int r = 0; r < task.rows; ++r) {
      float* row = task.scratch + r * kKeyTile;
      // Each vector of int16 probabilities overwrites scores already read.
      softmax_row<V>(row, from, to, task.begin[r], task.end[r], task.bias, task.softcap,
                     task.max + r, task.sum + r, [row](int key, __m512 p) {
                       const __m512i rounded =
                           _mm512_cvtps_epi32(_mm512_mul_ps(p, V::set(Tile::kProbability)));
                       _mm256_storeu_si256(
                           reinterpret_cast<__m256i*>(reinterpret_cast<char*>(row) + 2 * key),
                           _mm512_cvtepi32_epi16(rounded));
                       return _mm512_cvtepi32_ps(rounded);
                     });
      task.sum[r] *= 1.0f / Tile::kProbability;
    }
    const std::int32_t* probabilities = reinterpret_cast<const std::int32_t*>(task.scratch);
    const std::int32_t* values = static_cast<const std::int32_t*>(task.tile.values);
    const float* value_scale = task.tile.value_scale;
    const __m512 unit = V::set(1.0f / Tile::kProbability);
    product(probabilities + from / 2, kKeyTile, values + static_cast<long>(from / 2) * head, W,
            head, task.output, head, task.rows, head / W, (to - from) / 2,
            [&](int, int column, __m512 dot) {
              dot = _mm512_mul_ps(dot, unit);
              return Tile::kScaled ? _mm512_mul_ps(dot, V::load(value_scale + column)) : dot;
            });
  }

  static void fold(int rows, int head, SoftmaxState tile, SoftmaxState state) {
    fold_tile<V>(rows, head, tile, state);
  }

 private:
  static void pack_keys(const void* const* rows, int count, int head_size, PackedTile packed) {
    const int head = padded_head(head_size);
    float* out = static_cast<float*>(packed.keys);
    for (int key = 0; key < count; key += W) {
      float factor[W] = {};
      if constexpr (Tile::kScaled) {
        for (int i = 0; i < W; ++i) {
          const float top = largest(static_cast<const float*>(rows[key + i]), head_size);
          packed.key_scale[key + i] = top / Tile::kKey;
          factor[i] = top > 0 ? Tile::kKey / top : 0.0f;
        }
      }
      for (int d = 0; d < head; d += 2 * W) {
        __m512 block[W];
        for (int i = 0; i < W; ++i)
          block[i] = _mm512_castsi512_ps(
              key_channels(static_cast<const Stored*>(rows[key + i]), d, head_size, factor[i]));
        V::transpose(block);
        for (int i = 0; i < W; ++i, out += W) V::store(out, block[i]);
      }
    }
  }

  static void pack_values(const void* const* rows, int count, int head_size, PackedTile packed) {
    const int head = padded_head(head_size);
    std::int32_t* out = static_cast<std::int32_t*>(packed.values);
    for (int d = 0; d < head; d += W) {
      const int channels = head_size - d;
      __m512 factor = _mm512_setzero_ps();
      if constexpr (Tile::kScaled) {
        __m512 top = _mm512_setzero_ps();
        for (int key = 0; key < count; ++key)
          top = _mm512_max_ps(
              top, _mm512_abs_ps(load_floats(static_cast<const float*>(rows[key]) + d, channels)));
        V::store(packed.value_scale + d, _mm512_mul_ps(top, V::set(1.0f / Tile::kValue)));
        const __mmask16 used = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
        factor = _mm512_maskz_div_ps(used, V::set(Tile::kValue), top);
      }
      for (int key = 0; key < count; key += 2) {
        const Stored* even = static_cast<const Stored*>(rows[key]) + d;
        const Stored* odd = static_cast<const Stored*>(rows[key + 1]) + d;
        _mm512_storeu_si512(out + static_cast<long>(key / 2) * head + d,
                            channels > 0 ? pair(even, odd, channels, factor)
                                         : _mm512_setzero_si512());
      }
    }
  }

  // 16 channels of two keys, interleaved.
  static __m512i pair(const std::int8_t* even, const std::int8_t* odd, int channels, __m512) {
    const __mmask16 mask = first_lanes(channels);
    const __m128i a = _mm_maskz_loadu_epi8(mask, even), b = _mm_maskz_loadu_epi8(mask, odd);
    return _mm512_cvtepi8_epi16(
        _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
  }
  static __m512i pair(const float* even, const float* odd, int channels, __m512 factor) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats(even, channels), factor));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats(odd, channels), factor));
    return _mm512_mask_mov_epi16(a, 0xaaaaaaaau, _mm512_slli_epi32(b, 16));
  }

  // As FloatKernels: c[r][j] = finish(sum over pairs k of a[r * lda + k] . b[j * b_vector + k *
  // b_step]).
  template <int R, int N, class Finish>
  static void block(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                    int b_step, float* c, int ldc, int depth, int row, int column,
                    const Finish& finish) {
    __m512i sum[R][N];  // in registers only once every loop over it is unrolled
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[r][j] = _mm512_setzero_si512();
    for (int k = 0; k < depth; ++k, b += b_step) {
      __m512i right[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) right[j] = _mm512_loadu_si512(b + j * b_vector);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i left = _mm512_set1_epi32(a[r * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[r][j] = add_products(sum[r][j], left, right[j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        V::store(c + r * ldc + j * W,
                 finish(row + r, column + j * W, _mm512_cvtepi32_ps(sum[r][j])));
  }

  template <int N, class Finish>
  static void columns(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, float* c, int ldc, int rows, int depth, int column,
                      const Finish& finish) {
    constexpr int R = V::kRows;
    int row = 0;
    auto rows_left = [&](auto count) {
      block<decltype(count)::value, N>(a + row * lda, lda, b, b_vector, b_step, c + row * ldc, ldc,
                                       depth, row, column, finish);
    };
    for (; row + R <= rows; row += R) rows_left(Count<R>());
    switch (rows - row) {
      case 1: return rows_left(Count<1>());
      case 2: return rows_left(Count<2>());
      case 3: return rows_left(Count<3>());
      case 4: return rows_left(Count<4>());
      case 5: return rows_left(Count<5>());
      default: return;
    }
  }

  template <class Finish>
  static void product(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, float* c, int ldc, int rows, int vectors, int depth,
                      const Finish& finish) {
    constexpr int N = V::kVectors;
    int j = 0;
    for (; j + N <= vectors; j += N)
      columns<N>(a, lda, b + j * b_vector, b_vector, b_step, c + j * W, ldc, rows, depth, j * W,
                 finish);
    for (; j < vectors; ++j)
      columns<1>(a, lda, b + j * b_vector, b_vector, b_step, c + j * W, ldc, rows, depth, j * W,
                 finish);
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };
};

}  // namespace

const AttentionKernels& attention_fixed_avx512(Element element) {
  using I = FixedKernels<Int8Tile>;
  using F = FixedKernels<FloatTile>;
  static constexpr AttentionKernels kInt8{I::pack_queries, I::pack_tile, I::attend, nullptr,
                                          I::fold};
  static constexpr AttentionKernels kFloat{F::pack_queries, F::pack_tile, F::attend, nullptr,
                                           F::fold};
  return element == Element::kFloat ? kFloat : kInt8;
}

}  // namespace glmcompile
