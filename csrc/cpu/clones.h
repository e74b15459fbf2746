// One copy of a function per instruction set, chosen when the library is loaded (needs glibc).
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CONTREC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CONTREC_CLONES
#endif
