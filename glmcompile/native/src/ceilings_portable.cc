#include "ceilings_loops.h"
#include "linear_vec_portable.h"

namespace glmcompile {
namespace {

struct IntPortable {
  struct T {
    std::int16_t factors[16];
    std::uint32_t sums[16];
  };
  static constexpr int kMultiplies = 16;
  static T load(const float* from) {
    T t = {};
    std::memcpy(t.factors, from, sizeof t.factors);
    return t;
  }
  static T multiply_add(T acc, T& a, const T& b) {
    change(a.factors);
    for (int i = 0; i < 16; ++i) {
      acc.sums[i] += static_cast<std::uint32_t>(std::int32_t{a.factors[i]} * b.factors[i]);
    }
    return acc;
  }
};

struct FloatPortable : FloatProduct<VecPortable> {
  static T multiply_add(const T& acc, T& a, const T& b) {
    change(a);
    return VecPortable::fma(a, b, acc);
  }
};

}  // namespace

const Ceilings& ceilings_portable() {
  static const Ceilings ceilings = {read<VecPortable>, multiply<IntPortable, 2>,
                                    multiply<FloatPortable, 2>};
  return ceilings;
}

}  // namespace glmcompile
