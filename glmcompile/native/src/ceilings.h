// What one thread can do at best, for judging the linear layers: loops that do nothing but read,
// and loops that do nothing but multiply, with the instructions of the linear kernels.
#pragma once

#include <cstdint>

namespace glmcompile {

struct Ceilings {
  // Reads `count` floats at `data`, a multiple of kReadStep.
  void (*read)(const float* data, std::int64_t count);
  // Multiply operands held in registers, over and over; return the operations done, two for each
  // multiply-accumulate.
  std::int64_t (*multiply_int8)(std::int64_t rounds);
  std::int64_t (*multiply_float)(std::int64_t rounds);
};

inline constexpr std::int64_t kReadStep = 16 * 8;

// Those of the instructions that select_linear_kernel() chooses.
const Ceilings& select_ceilings();

// Tables of each translation unit; only select_ceilings may name them.
const Ceilings& ceilings_portable();
#if defined(__x86_64__)
const Ceilings& ceilings_avx2();
const Ceilings& ceilings_avxvnni();
const Ceilings& ceilings_avx512();
const Ceilings& ceilings_amx();
#endif

}  // namespace glmcompile
