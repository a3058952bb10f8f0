// The W8A8 linear problem as every instruction set's kernels see it, and the table they fill.
#pragma once

#include <cstdint>

namespace glmcompile {

// Weights are stored [N/16][K/64][16 k4][16 n][4 k] int8, zero padded in N and K.
constexpr std::int64_t kBlockN = 16;
constexpr std::int64_t kBlockK = 64;
// Row tiles never exceed this height; row buffers are padded to a multiple of it.
constexpr std::int64_t kMaxTileRows = 32;
// |sum of uint8 * int8| stays below 2^31 up to this many terms.
constexpr std::int64_t kMaxInFeatures = 65536;

enum class Activation { kNone, kGelu, kGeluTanh, kQuickGelu, kSilu, kSwiglu };

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct LinearProblem {
  std::int64_t out_features;  // true N, before padding
  std::int64_t k_blocks;      // padded K / 64
  const std::int8_t* weight;
  const float* weight_scale;       // [N]
  const std::int32_t* weight_sum;  // [N], sum over k of the int8 weights
  const float* bias;               // [N] or null
  Activation activation;
  // Quantized activations: rows of k_blocks * 64 elements, `row_stride` bytes apart.
  const std::uint8_t* rows;
  std::int64_t row_stride;
  const float* row_scale;
  const std::int32_t* row_zero_point;
  // [M][output_width]; output_width is N, or N / 2 with swiglu.
  const float* residual;  // or null
  float* output;
  std::int64_t output_width;

  std::int64_t block_bytes() const { return k_blocks * kBlockK * kBlockN; }
};

// A static activation range; scale 0 means a dynamic range per row.
struct StaticRange {
  float scale;
  std::int32_t zero_point;
};

// How rows of activations become uint8.
struct RowQuantizer {
  StaticRange range;
  const float* input_scale;  // [K], multiplies each channel first, or null
  float rms_epsilon;         // of RMS normalization before that, dynamic ranges only; 0 = none
};

struct LinearKernel {
  const char* isa;
  std::int64_t tile_rows;      // height of the register tile, at most kMaxTileRows
  std::int64_t element_bytes;  // of a quantized activation as quantize_row stores it
  // x [n] float32 -> row [padded] of 0 to 255 (zero beyond n), one scale and zero point.
  void (*quantize_row)(const float* x, std::int64_t n, std::int64_t padded,
                       const RowQuantizer& how, std::uint8_t* row, float* scale,
                       std::int32_t* zero_point);
  // Output rows [row_begin, row_end) x channels of blocks [block_begin, block_end) of 16.
  // row_begin is a multiple of tile_rows; with swiglu block_begin is even. The memory of the rows
  // extends to the next multiple of kMaxTileRows. May be called concurrently on disjoint ranges.
  void (*gemm)(const LinearProblem& problem, std::int64_t row_begin, std::int64_t row_end,
               std::int64_t block_begin, std::int64_t block_end);
};

const LinearKernel& linear_kernel_portable();
const LinearKernel& linear_kernel_amx_emulated();
#if defined(__x86_64__)
const LinearKernel& linear_kernel_avx2();
const LinearKernel& linear_kernel_avxvnni();
const LinearKernel& linear_kernel_avx512();
const LinearKernel& linear_kernel_amx();
#endif

// The fastest kernel this CPU runs, capped by the environment variable GLMCOMPILE_ISA. Throws
// Error for an unknown value of the variable.
const LinearKernel& select_linear_kernel();

}  // namespace glmcompile
