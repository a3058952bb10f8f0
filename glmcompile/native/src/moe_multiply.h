// Rows of activations times one expert's float32 weights, as they stand in memory: packing weights
// would cost a decode step, which reads them once, as much as multiplying them.
//
// Written over a policy P for the register tile:
//   V: a vector type of sixteen lanes (linear_vec_*.h);
//   kRows, kColumns: rows, and channels or vectors of channels, of a tile;
//   sum_channels(acc, sums): the kColumns sums over the lanes of as many vectors.
#pragma once

#include "moe_kernels.h"

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

// Weights of one tile of channels, so many k long, stay in the L1 cache while rows pass by.
constexpr std::int64_t kDotDepth = 1024;
// Transposed weights: rows of k at a time; and for few rows, whose sums then stay in the L1 cache
// while whole rows of weights pass by.
constexpr std::int64_t kColumnDepth = 128;
constexpr std::int64_t kColumnDepthFewRows = 16;
// Rows at a time: kDotDepth elements of each stay in the L2 cache.
constexpr std::int64_t kPassRows = 96;

inline void prefetch(const float* at) { __builtin_prefetch(at, 0, 2); }

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <int n>
struct Constant {
  constexpr operator int() const { return n; }
};

// f(Constant<n>) for 1 <= n <= N.
template <int N, class F>
inline void with_constant(std::int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(Constant<N>{});
}

// While a tile of weights is multiplied with all tiles of rows, each of these fetches its share of
// the weights that follow: all at once they would keep its own from the registers.
struct Share {
  std::int64_t part, parts;
  std::int64_t begin(std::int64_t n) const { return n * part / parts; }
  std::int64_t end(std::int64_t n) const { return n * (part + 1) / parts; }
};

// Calls f(row, rows, share) for tiles of even height: a last tile of one row would waste most of
// the registers.
template <class P, class F>
inline void for_row_tiles(std::int64_t count, const F& f) {
  const std::int64_t tiles = (count + P::kRows - 1) / P::kRows;
  const std::int64_t height = (count + tiles - 1) / tiles;
  Share share{0, (count + height - 1) / height};
  for (std::int64_t row = 0; row < count; row += height, ++share.part) {
    with_constant<P::kRows>(least(height, count - row), [&](auto rows) { f(row, rows, share); });
  }
}

// sums [rows][kColumns] = products of rows and channels over k in [begin, end). `ahead`: how many
// floats further the next channels are.
template <class P, int rows>
inline void dot_tile(const float* const* a, const float* const* w, std::int64_t begin,
                     std::int64_t end, std::int64_t ahead, Share share, float* sums) {
  using V = typename P::V;
  constexpr int columns = P::kColumns;
  typename V::F acc[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) acc[r][c] = V::set(0.0f);
  }
  const auto step = [&](auto load) {
    typename V::F b[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) b[c] = load(w[c]);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const auto x = load(a[r]);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) acc[r][c] = V::fma(x, b[c], acc[r][c]);
    }
  };
  std::int64_t k = begin;
  // Moves by less than a cache line where there are several shares: lines are asked for again.
  std::int64_t fetch = begin + share.begin(end - begin) + ahead;
  const std::int64_t fetch_step = (kMoELanes + share.parts - 1) / share.parts;
  for (; k + kMoELanes <= end; k += kMoELanes, fetch += fetch_step) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) prefetch(w[c] + fetch);
    step([k](const float* from) { return V::load(from + k); });
  }
  if (k < end) step([k, end](const float* from) { return V::load_n(from + k, end - k); });
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) P::sum_channels(acc[r], sums + r * columns);
}

// Weights [N, K]: dot products along k.
template <class P>
struct DotProducts {
  const float* const* rows;
  std::int64_t count;
  const ExpertLayer& layer;
  std::int64_t first, last;
  float* out;
  std::int64_t out_stride;

  // Adds k in [begin, end) to the tile of channels from `channel` on.
  void add(std::int64_t channel, std::int64_t begin, std::int64_t end) const {
    constexpr int columns = P::kColumns;
    const std::int64_t channels = least(columns, last - channel);
    const float* w[columns];
    // Channels beyond the last repeat it, and are dropped.
    for (int c = 0; c < columns; ++c) {
      w[c] = layer.weight + (channel + least(c, channels - 1)) * layer.in_features;
    }
    for_row_tiles<P>(count, [&](std::int64_t row, auto height, Share share) {
      float sums[height * columns];
      dot_tile<P, height>(rows + row, w, begin, end, columns * layer.in_features, share, sums);
      for (int r = 0; r < height; ++r) {
        float* to = out + (row + r) * out_stride + (channel - first);
        for (std::int64_t c = 0; c < channels; ++c) {
          const float before =
              begin > 0 ? to[c] : layer.bias != nullptr ? layer.bias[channel + c] : 0.0f;
          to[c] = before + sums[r * columns + c];
        }
      }
    });
  }

  void run() const {
    const std::int64_t depth = layer.in_features;
    const auto end = [&](std::int64_t k) { return least(k + kDotDepth, depth); };
    if (count <= P::kRows) {  // one tile of rows: every channel's weights in one run
      for (std::int64_t channel = first; channel < last; channel += P::kColumns) {
        for (std::int64_t k = 0; k < depth; k += kDotDepth) add(channel, k, end(k));
      }
    } else {
      for (std::int64_t k = 0; k < depth; k += kDotDepth) {
        for (std::int64_t channel = first; channel < last; channel += P::kColumns) {
          add(channel, k, end(k));
        }
      }
    }
  }
};

// out [rows][columns vectors] += products over k in [begin, end); w points at the tile's first
// channel of k = 0. left: channels of the last vector.
template <class P, int rows, int columns>
inline void column_tile(const float* const* a, const float* w, std::int64_t w_stride,
                        std::int64_t begin, std::int64_t end, std::int64_t left, float* out,
                        std::int64_t out_stride) {
  using V = typename P::V;
  typename V::F acc[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) acc[r][c] = V::load(out + r * out_stride + c * kMoELanes);
  }
  const auto sweep = [&](auto load) {
    for (std::int64_t k = begin; k < end; ++k) {
      const float* from = w + k * w_stride;
      typename V::F b[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) b[c] = load(from + c * kMoELanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto x = V::set(a[r][k]);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) acc[r][c] = V::fma(x, b[c], acc[r][c]);
      }
    }
  };
  if (columns > 1 || left == kMoELanes) sweep([](const float* from) { return V::load(from); });
  else sweep([left](const float* from) { return V::load_n(from, left); });
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) V::store(out + r * out_stride + c * kMoELanes, acc[r][c]);
  }
}

// Weights [K, N]: every k adds its row of weights to the sums.
template <class P>
struct ColumnSums {
  const float* const* rows;
  std::int64_t count;
  const ExpertLayer& layer;
  std::int64_t first, last;
  float* out;
  std::int64_t out_stride;

  void start_with_bias() const {
    for (std::int64_t row = 0; row < count; ++row) {
      float* to = out + row * out_stride;
      std::int64_t c = 0;
      for (; c < last - first; ++c) to[c] = layer.bias != nullptr ? layer.bias[first + c] : 0.0f;
      for (; c % kMoELanes != 0; ++c) to[c] = 0.0f;
    }
  }

  template <int columns>
  void add(std::int64_t channel, std::int64_t begin, std::int64_t end, std::int64_t ahead) const {
    const std::int64_t left = least(last - channel, kMoELanes);
    const float* w = layer.weight + channel;
    const std::int64_t stride = layer.out_features;
    for_row_tiles<P>(count, [&](std::int64_t row, auto height, Share share) {
      for (std::int64_t k = share.begin(end - begin); k < share.end(end - begin); ++k) {
        const float* next = w + (begin + k) * stride + ahead;
        for (int c = 0; c < columns; ++c) prefetch(next + c * kMoELanes);
      }
      column_tile<P, height, columns>(rows + row, w, stride, begin, end, left,
                                      out + row * out_stride + (channel - first), out_stride);
    });
  }

  void run() const {
    constexpr std::int64_t wide = P::kColumns * kMoELanes;
    const bool few = count <= kMoEFewRows;
    const std::int64_t depth = few ? kColumnDepthFewRows : kColumnDepth;
    // What is read next: the same channels further down, or their neighbours.
    const std::int64_t ahead = few ? depth * layer.out_features : wide;
    start_with_bias();
    for (std::int64_t k = 0; k < layer.in_features; k += depth) {
      const std::int64_t end = least(k + depth, layer.in_features);
      std::int64_t channel = first;
      for (; channel + wide <= last; channel += wide) add<P::kColumns>(channel, k, end, ahead);
      for (; channel < last; channel += kMoELanes) add<1>(channel, k, end, ahead);
    }
  }
};

template <class P>
void multiply(const float* const* rows, std::int64_t count, const ExpertLayer& layer,
              std::int64_t first, std::int64_t last, float* out, std::int64_t out_stride) {
  for (std::int64_t row = 0; row < count; row += kPassRows) {
    const std::int64_t now = least(kPassRows, count - row);
    float* to = out + row * out_stride;
    if (layer.transposed) {
      ColumnSums<P>{rows + row, now, layer, first, last, to, out_stride}.run();
    } else {
      DotProducts<P>{rows + row, now, layer, first, last, to, out_stride}.run();
    }
  }
}

}  // namespace
}  // namespace glmcompile
