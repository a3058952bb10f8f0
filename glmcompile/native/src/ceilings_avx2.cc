#include "ceilings_loops.h"
#include "linear_vec_avx2.h"

namespace glmcompile {
namespace {

// Widened to int16 as in linear_avx2.cc.
struct Int16 {
  using T = __m256i;
  static constexpr int kMultiplies = 16;
  static T load(const float* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static T multiply_add(T acc, T& a, T b) {
    __asm__ volatile("" : "+x"(a));  // change() without a detour through memory
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
  }
};

}  // namespace

const Ceilings& ceilings_avx2() {
  // A float chain takes two of the sixteen registers.
  static const Ceilings ceilings = {read<VecAvx2>, multiply<Int16, 10>,
                                    multiply<FloatProduct<VecAvx2>, 6>};
  return ceilings;
}

}  // namespace glmcompile
