#include "amx_tiles.h"
#include "ceilings_loops.h"
#include "linear_vec_avx512.h"

namespace glmcompile {
namespace {

constexpr std::int64_t kTileMultiplies = 16 * 16 * 64;

// The four accumulators of linear_amx_kernel.h.
std::int64_t multiply_tiles(std::int64_t rounds) {
  const Operands operands;
  HardwareTiles::configure();
  HardwareTiles::load<4>(operands.at(0), 64);
  HardwareTiles::load<5>(operands.at(0), 64);
  HardwareTiles::load<6>(operands.at(0), 64);
  HardwareTiles::load<7>(operands.at(0), 64);
  HardwareTiles::zero<0>();
  HardwareTiles::zero<1>();
  HardwareTiles::zero<2>();
  HardwareTiles::zero<3>();
  for (std::int64_t r = 0; r < rounds; ++r) {
    HardwareTiles::multiply<0, 4, 6>();
    HardwareTiles::multiply<1, 4, 7>();
    HardwareTiles::multiply<2, 5, 6>();
    HardwareTiles::multiply<3, 5, 7>();
  }
  HardwareTiles::release();
  return rounds * 4 * kTileMultiplies * 2;
}

}  // namespace

const Ceilings& ceilings_amx() {
  static const Ceilings ceilings = {read<VecAvx512>, multiply_tiles,
                                    multiply<FloatProduct<VecAvx512>, 16>};
  return ceilings;
}

}  // namespace glmcompile
