// What the processor can run, and which kernels to choose.
#pragma once

namespace glmcompile {

// In ascending order of preference within one architecture; a level implies the ones below it.
enum class Isa : int {
  kPortable = 0,
  kNeon = 1,        // arm64
  kAvx2 = 2,        // AVX2, FMA, F16C
  kAvx512 = 3,      // AVX-512 F, BW, DQ, VL and VNNI
  kAvx512Bf16 = 4,  // and AVX512_BF16
  kAmx = 5,         // and AMX tiles with int8 and bf16, granted by the kernel
};

struct CpuFeatures {
  Isa isa = Isa::kPortable;
  bool avx_vnni = false;  // VEX-encoded VNNI, which AVX2-only processors may have
  bool neon_dotprod = false;
};

// Detected once per process.
const CpuFeatures& cpu_features();

// The level to use: the detected one, capped by the environment variable GLMCOMPILE_ISA
// (portable, neon, avx2, avx512, avx512_bf16 or amx; amx_emulated caps at what the processor has
// without AMX). Read at every call, so that one process can create kernels of every level.
// Throws Error for any other value.
Isa selected_isa();

// True when GLMCOMPILE_ISA asks for the AMX kernels on emulated tiles (tests).
bool amx_emulation_requested();

const char* isa_name(Isa isa);

}  // namespace glmcompile
