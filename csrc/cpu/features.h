// What this processor and this build can do, found out at run time.
#pragma once

namespace contrec::cpu {

// Instruction sets that both the processor and the operating system support.
// All false on processors other than x86-64.
struct Features {
  bool avx2 = false;
  bool fma = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512_bf16 = false;
  bool avx512_vnni = false;
};

// Detected on the first call, then cached; thread safe.
const Features& features();

// Whether the extension was built with OpenMP.
bool has_openmp();

// Threads a parallel region uses by default; 1 without OpenMP.
int openmp_max_threads();

// The calling thread's number in the innermost parallel region; 0 outside and without OpenMP.
int thread_number();

// Compiler name and version, for example "gcc 12.2.0".
const char* compiler();

}  // namespace contrec::cpu
