// Code for several instruction sets in one program.
#pragma once

// Whether functions can be compiled for instructions that the rest of the program does without.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONTREC_TARGETS 1
#endif

// One copy of a function per instruction set, chosen when the library is loaded (needs glibc).
#if defined(CONTREC_TARGETS) && defined(__GLIBC__)
#define CONTREC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CONTREC_CLONES
#endif
