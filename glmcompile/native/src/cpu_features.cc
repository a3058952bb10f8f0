#include "cpu_features.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "ort_abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace glmcompile {
namespace {

#if defined(__x86_64__)

uint64_t enabled_register_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to a process that asks for it.
bool request_tile_state() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures features;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
  if (!fma || !osxsave || !f16c) return features;
  const uint64_t state = enabled_register_state();
  if ((state & 0x6) != 0x6) return features;

  unsigned b7 = 0, c7 = 0, d7 = 0, max_subleaf = 0;
  if (!__get_cpuid_count(7, 0, &max_subleaf, &b7, &c7, &d7)) return features;
  unsigned a71 = 0;
  if (max_subleaf >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  if (!(b7 & (1u << 5))) return features;
  features.isa = Isa::kAvx2;
  features.avx_vnni = a71 & (1u << 4);

  const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F DQ BW VL
  if ((b7 & avx512) != avx512 || !(c7 & (1u << 11)) || (state & 0xe6) != 0xe6) return features;
  features.isa = Isa::kAvx512;
  if (!(a71 & (1u << 5))) return features;
  features.isa = Isa::kAvx512Bf16;

  const unsigned amx = (1u << 22) | (1u << 24) | (1u << 25);  // BF16 TILE INT8
  if ((d7 & amx) == amx && (state & 0x60000) == 0x60000 && request_tile_state())
    features.isa = Isa::kAmx;
  return features;
}

#elif defined(__aarch64__)

CpuFeatures detect() {
  CpuFeatures features;
  features.isa = Isa::kNeon;
#if defined(__linux__)
  features.neon_dotprod = getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  features.neon_dotprod = true;  // every Apple silicon processor has it
#endif
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

constexpr const char* kVariable = "GLMCOMPILE_ISA";
constexpr Isa kLevels[] = {Isa::kPortable, Isa::kNeon,       Isa::kAvx2,
                           Isa::kAvx512,   Isa::kAvx512Bf16, Isa::kAmx};

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kNeon: return "neon";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
  }
  return "portable";
}

bool amx_emulation_requested() {
  const char* value = std::getenv(kVariable);
  return value != nullptr && std::strcmp(value, "amx_emulated") == 0;
}

Isa selected_isa() {
  const Isa detected = cpu_features().isa;
  const char* value = std::getenv(kVariable);
  if (value == nullptr || *value == '\0') return detected;
  if (amx_emulation_requested()) return detected < Isa::kAmx ? detected : Isa::kAvx512Bf16;
  // For linear layers alone, which look at it themselves; the rest has no code of its own for it.
  if (std::strcmp(value, "avx_vnni") == 0) return detected < Isa::kAvx2 ? detected : Isa::kAvx2;
  for (Isa level : kLevels)
    if (std::strcmp(value, isa_name(level)) == 0) return level < detected ? level : detected;
  fail("environment variable ", kVariable, ": ", value,
       " is none of portable, neon, avx2, avx_vnni, avx512, avx512_bf16, amx, amx_emulated");
}

}  // namespace glmcompile
