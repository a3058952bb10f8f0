// Tile kernels with 8-bit products: AVX-512 VNNI, four times the rate of float32 FMA.
//
// vpdpbusd multiplies groups of four unsigned with four signed bytes and adds them to int32,
// exactly. Keys and values are int8 and enter as they are. A query is rounded to int8 with a scale
// of its own and stored 128 too high; its sums start at -128 times the sum of the key's channels to
// make up for it. Probabilities are relative to the largest of the row in the tile, in steps of
// 1 / 255, and the sum that divides them is that of the rounded ones.
//
// Packed keys: [key / 16][channel / 4][16 keys][4 channels]; packed values: [key / 4][padded_head]
// [4 keys], groups of four keys in the order that narrowing leaves probabilities in (see
// value_group); queries and probabilities: bytes, rows as far apart as their float counterparts.

#include "attention_kernels.h"
#include "attention_softmax.h"
#include "attention_vec_avx512.h"

namespace glmcompile {
namespace {

using V = VecAvx512;
constexpr int W = V::kWidth;
constexpr int kBlock = 4 * W;  // keys whose probabilities are narrowed together

__mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }

__m512 load_floats(const float* p, int n) {
  return n > 0 ? _mm512_maskz_loadu_ps(first_lanes(n), p) : _mm512_setzero_ps();
}

__m512i load_bytes(const void* row, int d, int head_size) {
  const int n = head_size - d;
  const __mmask64 mask = n >= 64 ? ~0ull : (1ull << n) - 1u;
  return _mm512_maskz_loadu_epi8(mask, static_cast<const std::int8_t*>(row) + d);
}

// sum += a . b over groups of four unsigned bytes of a, signed bytes of b. Written as assembly
// since GCC copies the accumulators of the intrinsic through other registers and memory in every
// step of a register-blocked loop.
inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// 2^-(t / 2048) * 32767 for int16 t >= 0; relative error below 2e-4.
inline __m512i exp2_int16(__m512i t) {
  const __m512i f = _mm512_and_si512(_mm512_slli_epi16(t, 4), _mm512_set1_epi16(0x7ff0));
  __m512i p = _mm512_mulhrs_epi16(f, _mm512_set1_epi16(-1298));
  p = _mm512_add_epi16(p, _mm512_set1_epi16(7575));
  p = _mm512_add_epi16(_mm512_mulhrs_epi16(p, f), _mm512_set1_epi16(-22662));
  p = _mm512_add_epi16(_mm512_mulhrs_epi16(p, f), _mm512_set1_epi16(32767));
  return _mm512_srlv_epi16(p, _mm512_srli_epi16(t, 11));
}

// Where packed values hold keys [4 * group, 4 * group + 4): packing instructions interleave the
// 128-bit lanes of the four vectors of a block.
constexpr int value_group(int group) { return group / 16 * 16 + group % 4 * 4 + group % 16 / 4; }

class Int8Kernels {
 public:
  static void pack_queries(const float* const* rows, int count, int head_size,
                           const float* channel_scale, PackedQueries packed) {
    constexpr float kLargest = 127;
    const int head = padded_head(head_size);
    char* out = static_cast<char*>(packed.rows);
    for (int r = 0; r < count; ++r, out += 4 * head) {
      alignas(64) float query[kMaxHeadSize];
      __m512 largest = _mm512_setzero_ps();
      for (int d = 0; d < head; d += W) {
        const __m512 x = _mm512_mul_ps(load_floats(rows[r] + d, head_size - d),
                                       load_floats(channel_scale + d, head_size - d));
        V::store(query + d, x);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
      }
      const float top = V::reduce_max(largest);
      packed.scale[r] = top / kLargest;
      const __m512 factor = V::set(top > 0 ? kLargest / top : 0.0f);
      for (int d = 0; d < head; d += W) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(query + d), factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(x, _mm512_set1_epi32(128))));
      }
    }
  }

  static void pack_tile(const void* const* key_rows, const void* const* value_rows, int count,
                        int head_size, PackedTile packed) {
    pack_keys(key_rows, count, head_size, packed);
    pack_values(value_rows, count, head_size, static_cast<char*>(packed.values));
  }

  static void attend(const AttendTile& task) {
    const int head = padded_head(task.head_size);
    int from = kKeyTile, to = 0;
    for (int r = 0; r < task.rows; ++r) {
      if (task.begin[r] >= task.end[r]) continue;
      from = task.begin[r] < from ? task.begin[r] : from;
      to = task.end[r] > to ? task.end[r] : to;
    }
    const int first = from / W * W, last = (to + W - 1) / W * W;
    const std::int32_t* keys =
        static_cast<const std::int32_t*>(task.tile.keys) + static_cast<long>(first) * (head / 4);
    const float* query_scale = task.queries.scale;
    product(static_cast<const std::int32_t*>(task.queries.rows), head, keys, W * (head / 4), W,
            task.tile.key_sum + first, task.scratch + first, kKeyTile, task.rows,
            (last - first) / W, head / 4, [&](int row) { return query_scale[row]; });
    from = from / kBlock * kBlock;
    to = (to + kBlock - 1) / kBlock * kBlock;
    for (int r = 0; r < task.rows; ++r) softmax(task, r, from, to);
    const std::int32_t* values = static_cast<const std::int32_t*>(task.tile.values);
    product(reinterpret_cast<const std::int32_t*>(task.scratch) + from / 4, kKeyTile,
            values + static_cast<long>(from / 4) * head, W, head, nullptr, task.output, head,
            task.rows, head / W, (to - from) / 4, [](int) { return kUnit; });
  }

  static void fold(int rows, int head, SoftmaxState tile, SoftmaxState state) {
    fold_tile<V>(rows, head, tile, state);
  }

  static void quantize(const float* rows, std::int64_t stride, std::int64_t count, int head_size,
                       bool centered, std::int8_t* out, float* scale) {
    for (int d = 0; d < head_size; d += W) {
      const __mmask16 mask = first_lanes(head_size - d);
      __m512 low = V::set(-kMinusInfinity), high = V::set(kMinusInfinity);
      for (std::int64_t i = 0; i < count; ++i) {
        const __m512 x = _mm512_maskz_loadu_ps(mask, rows + i * stride + d);
        low = _mm512_min_ps(low, x);
        high = _mm512_max_ps(high, x);
      }
      const __m512 middle = centered ? _mm512_mul_ps(_mm512_add_ps(low, high), V::set(0.5f))
                                   : _mm512_setzero_ps();
      const __m512 top = _mm512_max_ps(_mm512_abs_ps(_mm512_sub_ps(low, middle)),
                                       _mm512_abs_ps(_mm512_sub_ps(high, middle)));
      _mm512_mask_storeu_ps(scale + d, mask, _mm512_mul_ps(top, V::set(1.0f / 127)));
      const __mmask16 used = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
      const __m512 factor = _mm512_maskz_div_ps(used, V::set(127), top);
      for (std::int64_t i = 0; i < count; ++i) {
        const __m512 x =
            _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, rows + i * stride + d), middle);
        _mm512_mask_cvtsepi32_storeu_epi8(out + i * stride + d, mask,
                                          _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
      }
    }
  }

 private:
  static constexpr float kUnit = 1.0f / 255;  // of probabilities

  static void pack_keys(const void* const* rows, int count, int head_size, PackedTile packed) {
    const int head = padded_head(head_size);
    float* out = static_cast<float*>(packed.keys);
    const __m512i ones = _mm512_set1_epi8(1);
    for (int key = 0; key < count; key += W) {
      __m512i sum = _mm512_setzero_si512();
      for (int d = 0; d < head; d += 64) {
        __m512 block[W];
        for (int i = 0; i < W; ++i)
          block[i] = _mm512_castsi512_ps(load_bytes(rows[key + i], d, head_size));
        V::transpose(block);
        const int groups = head - d < 64 ? (head - d) / 4 : W;
        for (int i = 0; i < groups; ++i, out += W) {
          V::store(out, block[i]);
          sum = add_products(sum, ones, _mm512_castps_si512(block[i]));
        }
      }
      _mm512_storeu_si512(packed.key_sum + key, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
    }
  }

  static void pack_values(const void* const* rows, int count, int head_size, char* packed) {
    const int head = padded_head(head_size);
    // With its dwords in this order, unpacking within 128-bit lanes leaves channels in order.
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int key = 0; key < (count + kBlock - 1) / kBlock * kBlock; key += 4) {
      char* out = packed + static_cast<long>(value_group(key / 4)) * head * 4;
      for (int d = 0; d < head; d += 64) {
        __m512i row[4];
        for (int i = 0; i < 4; ++i)
          row[i] = key < count ? _mm512_permutexvar_epi32(
                                     order, load_bytes(rows[key + i], d, head_size))
                               : _mm512_setzero_si512();
        const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]);
        const __m512i b = _mm512_unpackhi_epi8(row[0], row[1]);
        const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]);
        const __m512i e = _mm512_unpackhi_epi8(row[2], row[3]);
        _mm512_storeu_si512(out + 4 * d, _mm512_unpacklo_epi16(a, c));
        _mm512_storeu_si512(out + 4 * d + 64, _mm512_unpackhi_epi16(a, c));
        if (head - d < 64) break;
        _mm512_storeu_si512(out + 4 * d + 128, _mm512_unpacklo_epi16(b, e));
        _mm512_storeu_si512(out + 4 * d + 192, _mm512_unpackhi_epi16(b, e));
      }
    }
  }

  // Turns row r of scores into bytes, over the scores already read.
  static void softmax(const AttendTile& task, int r, int from, int to) {
    float* scores = task.scratch + r * kKeyTile;
    const float top = mask_scores<V>(scores, from, to, task.begin[r], task.end[r], task.bias,
                                     task.softcap);
    task.max[r] = top;
    char* out = reinterpret_cast<char*>(scores);
    __m512i sum = _mm512_setzero_si512();
    // Distances from the maximum in steps of 1 / 2048; what is farther than 16 gets no weight.
    const __m512 step = V::set(-2048), shift = V::set(top * 2048), limit = V::set(32767);
    const __m512i ones = _mm512_set1_epi8(1), full = _mm512_set1_epi16(255);
    auto distance = [&](int key) {
      const __m512 x = _mm512_fmadd_ps(V::load(scores + key), step, shift);
      return _mm512_cvtps_epi32(_mm512_min_ps(x, limit));
    };
    for (int key = from; key < to; key += kBlock) {
      if (top == kMinusInfinity) {
        _mm512_storeu_si512(out + key, sum);
        continue;
      }
      const __m512i a = exp2_int16(_mm512_packs_epi32(distance(key), distance(key + W)));
      const __m512i b =
          exp2_int16(_mm512_packs_epi32(distance(key + 2 * W), distance(key + 3 * W)));
      const __m512i p =
          _mm512_packus_epi16(_mm512_mulhrs_epi16(a, full), _mm512_mulhrs_epi16(b, full));
      _mm512_storeu_si512(out + key, p);
      sum = add_products(sum, p, ones);
    }
    task.sum[r] = static_cast<float>(_mm512_reduce_add_epi32(sum)) * kUnit;
  }

  // c[r][j] = scale(r) * (start[j] + sum over groups k of a[r * lda + k] . b[j * b_vector + k *
  // b_step]) for a block of R rows and N vectors; a start of null is 0.
  template <int R, int N, class Scale>
  static void block(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                    int b_step, const std::int32_t* start, float* c, int ldc, int depth, int row,
                    const Scale& scale) {
    __m512i sum[R][N];  // in registers only once every loop over it is unrolled
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        sum[r][j] = start == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(start + j * W);
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
    for (int r = 0; r < R; ++r) {
      const __m512 factor = V::set(scale(row + r));
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        V::store(c + r * ldc + j * W, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][j]), factor));
    }
  }

  template <int N, class Scale>
  static void columns(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, const std::int32_t* start, float* c, int ldc, int rows,
                      int depth, const Scale& scale) {
    constexpr int R = V::kRows;
    int row = 0;
    auto rows_left = [&](auto count) {
      block<decltype(count)::value, N>(a + row * lda, lda, b, b_vector, b_step, start,
                                       c + row * ldc, ldc, depth, row, scale);
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

  template <class Scale>
  static void product(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, const std::int32_t* start, float* c, int ldc, int rows,
                      int vectors, int depth, const Scale& scale) {
    constexpr int N = V::kVectors;
    auto start_at = [&](int j) { return start == nullptr ? nullptr : start + j * W; };
    int j = 0;
    for (; j + N <= vectors; j += N)
      columns<N>(a, lda, b + j * b_vector, b_vector, b_step, start_at(j), c + j * W, ldc, rows,
                 depth, scale);
    for (; j < vectors; ++j)
      columns<1>(a, lda, b + j * b_vector, b_vector, b_step, start_at(j), c + j * W, ldc, rows,
                 depth, scale);
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };
};

}  // namespace

const AttentionKernels& attention_int8_avx512(Element element) {
  using K = Int8Kernels;
  static constexpr AttentionKernels kInt8{K::pack_queries, K::pack_tile, K::attend, nullptr,
                                          K::fold, nullptr};
  static constexpr AttentionKernels kFloat{K::pack_queries, K::pack_tile, K::attend, nullptr,
                                           K::fold, K::quantize};
  return element == Element::kFloat ? kFloat : kInt8;
}

}  // namespace glmcompile
