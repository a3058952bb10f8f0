// Tile kernels with 8-bit products: AVX-512 VNNI, four times the rate of float32 FMA.
//
// vpdpbusd multiplies groups of four unsigned with four signed bytes and adds them to int32,
// exactly. Keys and values are int8 and enter as they are. A query is rounded to int8 with a scale
// of its own and stored 128 too high; its sums start at -128 times the sum of the key's channels to
// make up for it. The most probable key of a row in the tile gets 255, the others integers relative
// to it, and the sum that divides them is that of the rounded ones.
//
// Packed keys: [key / 16][channel / 4][16 keys][4 channels]; packed values: [key / 4]
// [padded channels][4 keys], groups of four keys in the order that narrowing leaves probabilities in (see
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

// 2^-(t / 2048) * kExp2One for int16 t from -1024 on, 0 for -32768; relative error below 2e-4.
// The polynomial takes the distance to the nearest power of two.
constexpr short kExp2One = 23144;
inline __m512i exp2_int16(__m512i t) {
  const __m512i f = _mm512_slli_epi16(t, 5), power = _mm512_mulhrs_epi16(t, _mm512_set1_epi16(16));
  __m512i p = _mm512_mulhrs_epi16(f, _mm512_set1_epi16(-157));
  p = _mm512_add_epi16(p, _mm512_set1_epi16(1404));
  p = _mm512_add_epi16(_mm512_mulhrs_epi16(p, f), _mm512_set1_epi16(-8025));
  p = _mm512_add_epi16(_mm512_mulhrs_epi16(p, f), _mm512_set1_epi16(kExp2One));
  return _mm512_srlv_epi16(p, power);
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
      // Not 0, and its inverse not infinite.
      const float top = V::reduce_max(_mm512_max_ps(largest, V::set(1e-30f)));
      packed.scale[r] = top / kLargest;
      const __m512 factor = V::set(kLargest / top);
      for (int d = 0; d < head; d += W) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(query + d), factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(x, _mm512_set1_epi32(128))));
      }
    }
  }

  static void pack_tile(const TileRows& rows, const TileRows& ahead, HeadSizes head,
                        PackedTile packed) {
    pack_keys(rows.keys, rows.padded, ahead, head, packed);
    pack_values(rows.values, rows.padded, head.value, static_cast<char*>(packed.values));
  }

  static void attend(const AttendTile& task) {
    const KeyRange keys = key_range<V>(task);
    score(task, keys.from, keys.to);
    weigh_and_fold(task, keys, [&](const float* old, const float* fresh) {
      mix(task, keys.from / kBlock * kBlock, whole_blocks(keys.to), old, fresh);
    });
  }

  static void attend_unpacked(const AttendTile& task, const TileRows& rows,
                              const TileRows& ahead) {
    switch (task.rows) {
      case 1: return attend_few<1>(task, rows, ahead);
      case 2: return attend_few<2>(task, rows, ahead);
      case 3: return attend_few<3>(task, rows, ahead);
      default: return attend_few<4>(task, rows, ahead);
    }
  }

  static void fold(int rows, int width, SoftmaxState tile, SoftmaxState state) {
    fold_tile<V>(rows, width, tile, state);
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
  static constexpr float kLog2Of255 = 7.9943534f;

  static int whole_blocks(int keys) { return (keys + kBlock - 1) / kBlock * kBlock; }

  // Loads 64 channels from d of sixteen keys and leaves groups of four of them, all keys a vector.
  static inline __attribute__((always_inline)) void load_keys(const void* const* rows, int d,
                                                              int head_size, __m512* groups) {
    for (int i = 0; i < W; ++i)
      groups[i] = _mm512_castsi512_ps(load_bytes(rows[i], d, head_size));
    V::transpose(groups);
  }

  // Loads 64 channels from d of four values; vectors of sixteen channels with all four keys.
  static inline __attribute__((always_inline)) void load_values(const void* const* rows, int d,
                                                                int head_size, __m512i* out) {
    // With its dwords in this order, unpacking within 128-bit lanes leaves channels in order.
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      row[i] = _mm512_permutexvar_epi32(order, load_bytes(rows[i], d, head_size));
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]);
    const __m512i b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i e = _mm512_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, e);
    out[3] = _mm512_unpackhi_epi16(b, e);
  }

  static void pack_keys(const void* const* rows, int count, const TileRows& ahead, HeadSizes head,
                        PackedTile packed) {
    const int width = padded_head(head.key);
    float* out = static_cast<float*>(packed.keys);
    const __m512i ones = _mm512_set1_epi8(1);
    for (int key = 0; key < count; key += W) {
      if (key < ahead.padded) prefetch_rows(ahead, key, key + W, head, 1);
      __m512i sum = _mm512_setzero_si512();
      for (int d = 0; d < width; d += 64) {
        __m512 block[W];
        load_keys(rows + key, d, head.key, block);
        const int groups = width - d < 64 ? (width - d) / 4 : W;
        for (int i = 0; i < groups; ++i, out += W) {
          V::store(out, block[i]);
          sum = add_products(sum, ones, _mm512_castps_si512(block[i]));
        }
      }
      _mm512_storeu_si512(packed.key_sum + key, query_offset(sum));
    }
  }

  // What the 128 that are added to queries make of the sum of a key's channels.
  static __m512i query_offset(__m512i key_sum) {
    return _mm512_mullo_epi32(key_sum, _mm512_set1_epi32(-128));
  }

  static void pack_values(const void* const* rows, int count, int head_size, char* packed) {
    const int head = padded_head(head_size);
    for (int key = 0; key < whole_blocks(count); key += 4) {
      char* out = packed + static_cast<long>(value_group(key / 4)) * head * 4;
      for (int d = 0; d < head; d += 64) {
        __m512i block[4] = {};
        if (key < count) load_values(rows + key, d, head_size, block);
        _mm512_storeu_si512(out + 4 * d, block[0]);
        _mm512_storeu_si512(out + 4 * d + 64, block[1]);
        if (head - d < 64) break;
        _mm512_storeu_si512(out + 4 * d + 128, block[2]);
        _mm512_storeu_si512(out + 4 * d + 192, block[3]);
      }
    }
  }

  static void prefetch(const void* row, int d) {
    _mm_prefetch(static_cast<const char*>(row) + d, _MM_HINT_T0);
  }

  // The results of `attend`, without packed keys and values in between.
  template <int R>
  static void attend_few(const AttendTile& task, const TileRows& rows, const TileRows& ahead) {
    const KeyRange keys = key_range<V>(task);
    for (int key = keys.from; key < keys.to; key += W)
      score_few<R>(task, rows.keys + key, key, key < ahead.padded ? ahead.keys + key : rows.keys);
    weigh_and_fold(task, keys, [&](const float* old, const float* fresh) {
      for (int d = 0; d < task.head.value; d += 64)
        mix_few<R>(task, rows.values, keys, d, ahead, old, fresh);
    });
  }

  template <int R>
  static void score_few(const AttendTile& task, const void* const* rows, int key,
                        const void* const* ahead) {
    __m512i sum[R], key_sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_si512();
    const int head = padded_head(task.head.key);
    const std::int32_t* queries = static_cast<const std::int32_t*>(task.queries.rows);
    for (int d = 0; d < head; d += 64) {
      __m512 block[W];
      load_keys(rows, d, task.head.key, block);
      // Beyond the head keys are zero, and rows of queries are longer than their bytes.
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const __m512i right = _mm512_castps_si512(block[i]);
        prefetch(ahead[i], d);
        key_sum = add_products(key_sum, _mm512_set1_epi8(1), right);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r] = add_products(sum[r], _mm512_set1_epi32(queries[r * head + d / 4 + i]), right);
      }
    }
    const __m512i start = query_offset(key_sum);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      V::store(task.scratch + r * kKeyTile + key,
               _mm512_cvtepi32_ps(_mm512_add_epi32(sum[r], start)));
  }

  // Folds the products of probabilities and 64 channels of values, from d.
  template <int R>
  static void mix_few(const AttendTile& task, const void* const* rows, KeyRange keys, int d,
                      const TileRows& ahead, const float* old, const float* fresh) {
    const std::int32_t* weights = reinterpret_cast<const std::int32_t*>(task.scratch);
    __m512i sum[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
    for (int key = keys.from; key < keys.to; key += 4) {
      __m512i right[4];
      load_values(rows + key, d, task.head.value, right);
      if (key < ahead.padded) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) prefetch(ahead.values[key + i], d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i left = _mm512_set1_epi32(weights[r * kKeyTile + value_group(key / 4)]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[r][j] = add_products(sum[r][j], left, right[j]);
      }
    }
    const int left = (padded_head(task.head.value) - d) / W;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (j < left) fold_products(task, r, d / W + j, sum[r][j], old[r], fresh[r]);
  }

  static inline __attribute__((always_inline)) void fold_products(const AttendTile& task, int row,
                                                                  int vector, __m512i sum,
                                                                  float old, float fresh) {
    float* out = task.state.output + static_cast<long>(row) * padded_head(task.head.value) +
                 vector * W;
    V::store(out, fold_vector<V>(V::load(out), _mm512_cvtepi32_ps(sum), V::set(old),
                                 V::set(fresh)));
  }

  // Turns scores of `keys` into probabilities, and folds those and what `mix` makes of them.
  template <class Mix>
  static void weigh_and_fold(const AttendTile& task, KeyRange keys, const Mix& mix) {
    alignas(64) float top[kRowBlock], sum[kRowBlock], old[kRowBlock], fresh[kRowBlock];
    softmax(task, keys.from / kBlock * kBlock, whole_blocks(keys.to), top, sum);
    fold_factors<V>(task.rows, top, task.state.max, old, fresh);
    fold_sums(task.rows, top, sum, old, fresh, task.state);
    mix(old, fresh);
  }

  // Scores of keys [first, last), in units of the queries' scales.
  static void score(const AttendTile& task, int first, int last) {
    const int head = padded_head(task.head.key);
    const std::int32_t* start = task.tile.key_sum + first;
    float* scores = task.scratch + first;
    product(static_cast<const std::int32_t*>(task.queries.rows), head,
            static_cast<const std::int32_t*>(task.tile.keys) + static_cast<long>(first) * head / 4,
            W * (head / 4), W, task.rows, (last - first) / W, head / 4,
            [=](int vector) { return _mm512_loadu_si512(start + vector * W); },
            [=](int row, int vector, __m512i sum) {
              V::store(scores + row * kKeyTile + vector * W, _mm512_cvtepi32_ps(sum));
            });
  }

  // Turns scores of keys [from, to) into bytes, over the scores already read. top: in the base-2
  // domain, of a probability of 1; sum: of the bytes.
  static void softmax(const AttendTile& task, int from, int to, float* top, float* sum) {
    const float* unit = task.queries.scale;
    for (int r = 0; r < task.rows; ++r)
      top[r] = mask_scores<V>(task.scratch + r * kKeyTile, from, to, RowMask(task, r, unit[r]));
    for (int r = 0; r < task.rows; ++r) {
      sum[r] = probabilities(task.scratch + r * kKeyTile, from, to, top[r], unit[r]);
      top[r] = top[r] * unit[r] - kLog2Of255;
    }
  }

  static float probabilities(float* scores, int from, int to, float top, float unit) {
    constexpr float kSteps = 2048;  // of a power of two
    // The distance of a masked score, or of all scores where top is -inf, is infinite or not a
    // number: either converts to the smallest integer, and gets no weight.
    const __m512 step = V::set(-kSteps * unit), shift = V::set(kSteps * unit * top);
    auto weights = [&](int key) {
      auto distance = [&](int at) {
        return _mm512_cvtps_epi32(_mm512_fmadd_ps(V::load(scores + at), step, shift));
      };
      const __m512i p = exp2_int16(_mm512_packs_epi32(distance(key), distance(key + W)));
      return _mm512_mulhrs_epi16(p, _mm512_set1_epi16((255 * 32768 + kExp2One / 2) / kExp2One));
    };
    char* out = reinterpret_cast<char*>(scores);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int key = from; key < to; key += kBlock) {
      const __m512i p = _mm512_packus_epi16(weights(key), weights(key + 2 * W));
      _mm512_storeu_si512(out + key, p);
      sum = add_products(sum, p, ones);
    }
    return static_cast<float>(_mm512_reduce_add_epi32(sum));
  }

  // Folds the products of probabilities and values of keys [from, to) into the output.
  static void mix(const AttendTile& task, int from, int to, const float* old,
                  const float* fresh) {
    const int width = padded_head(task.head.value);
    const std::int32_t* values = static_cast<const std::int32_t*>(task.tile.values);
    float* output = task.state.output;
    product(reinterpret_cast<const std::int32_t*>(task.scratch) + from / 4, kKeyTile,
            values + static_cast<long>(from) * width / 4, W, width, task.rows, width / W,
            (to - from) / 4, [](int) { return _mm512_setzero_si512(); },
            [=](int row, int vector, __m512i sum) {
              float* out = output + static_cast<long>(row) * width + vector * W;
              V::store(out, fold_vector<V>(V::load(out), _mm512_cvtepi32_ps(sum), V::set(old[row]),
                                           V::set(fresh[row])));
            });
  }

  // store(r, j, start(j) + sum over groups k of a[r * lda + k] . b[j * b_vector + k * b_step]) for
  // a block of R rows from `row` and N vectors from `vector`.
  template <int R, int N, class Start, class Store>
  static void block(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                    int b_step, int row, int vector, int depth, const Start& start,
                    const Store& store) {
    a += row * lda;
    b += vector * b_vector;
    __m512i sum[R][N];  // in registers only once every loop over it is unrolled
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      sum[0][j] = start(vector + j);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) sum[r][j] = sum[0][j];
    }
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
      for (int j = 0; j < N; ++j) store(row + r, vector + j, sum[r][j]);
  }

  template <int N, class Start, class Store>
  static void columns(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, int rows, int vector, int depth, const Start& start,
                      const Store& store) {
    constexpr int R = V::kRows;
    int row = 0;
    auto rows_left = [&](auto count) {
      block<decltype(count)::value, N>(a, lda, b, b_vector, b_step, row, vector, depth, start,
                                       store);
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

  template <class Start, class Store>
  static void product(const std::int32_t* a, int lda, const std::int32_t* b, int b_vector,
                      int b_step, int rows, int vectors, int depth, const Start& start,
                      const Store& store) {
    constexpr int N = V::kVectors;
    int vector = 0;
    for (; vector + N <= vectors; vector += N)
      columns<N>(a, lda, b, b_vector, b_step, rows, vector, depth, start, store);
    for (; vector < vectors; ++vector)
      columns<1>(a, lda, b, b_vector, b_step, rows, vector, depth, start, store);
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };
};

}  // namespace

const AttentionKernels& attention_int8_avx512(Element element) {
  using K = Int8Kernels;
  static constexpr AttentionKernels kInt8{1, 64, K::pack_queries, K::pack_tile, K::attend,
                                          K::attend_unpacked, K::fold, nullptr};
  static constexpr AttentionKernels kFloat{1, 0, K::pack_queries, K::pack_tile, K::attend,
                                           nullptr, K::fold, K::quantize};
  return element == Element::kFloat ? kFloat : kInt8;
}

}  // namespace glmcompile
