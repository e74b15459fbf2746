#include "cpu/features.h"

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CONTREC_X86_64 1
#include <cpuid.h>
#endif

namespace contrec::cpu {
namespace {

#ifdef CONTREC_X86_64

// Register states that the operating system saves (XCR0).
std::uint64_t saved_states() {
  std::uint32_t low, high;
  // Assembly, because the intrinsic would need -mxsave for the whole file.
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t(high) << 32) | low;
}

Features detect() {
  Features found;
  std::uint32_t eax, ebx, ecx, edx;
  const auto bit = [](std::uint32_t word, int position) { return ((word >> position) & 1u) != 0; };

  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  if (!bit(ecx, 27)) return found;  // OSXSAVE: xgetbv may be used
  const bool fma = bit(ecx, 12);
  const std::uint64_t saved = saved_states();
  const bool os_avx = (saved & 0x06) == 0x06;     // xmm, ymm
  const bool os_avx512 = (saved & 0xe6) == 0xe6;  // and the mask registers and zmm halves

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
  const std::uint32_t last_subleaf = eax;
  found.fma = os_avx && fma;
  found.avx2 = os_avx && bit(ebx, 5);
  found.avx512f = os_avx512 && bit(ebx, 16);
  found.avx512bw = os_avx512 && bit(ebx, 30);
  found.avx512_vnni = os_avx512 && bit(ecx, 11);
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    found.avx512_bf16 = os_avx512 && bit(eax, 5);
  }
  return found;
}

#else

Features detect() { return {}; }

#endif

}  // namespace

const Features& features() {
  static const Features found = detect();
  return found;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

int openmp_max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc";
#else
  return "unknown";
#endif
}

}  // namespace contrec::cpu
