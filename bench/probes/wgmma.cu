// The product of a weight-stationary sampler step: D [256, N] = A [256, 256] B [N, 256]^T in bf16
// with fp32 sums, A (weights, 128 KiB) in shared memory or in registers, B (a few users' rows) in
// shared memory; wgmma m64nNk16 against mma.sync m16n8k16. Two figures each: products in a row, and
// one product at a time with a CTA barrier behind it, as the chain of steps needs.
#include <cuda_bf16.h>

#include "probe.cuh"
#include "ptx.cuh"

constexpr int kRows = 256, kDepth = 256;
constexpr int kThreads = 512;  // 4 warpgroups of 64 rows, or 16 warps of 16 rows

enum Unit { kWgmma, kMmaSync };
enum Weights { kShared, kSharedSwizzled, kRegisters };
const char* const kUnits[] = {"wgmma", "mma_sync"};
const char* const kWeights[] = {"shared", "shared_swizzled_128b", "registers"};

// Byte offset of element (row, k) of a K-major operand in shared memory. Plain: core matrices of
// 8 rows x 16 bytes, each 128 bytes in a row, K-neighbours adjacent. Swizzled: panels of 64 columns
// (128 bytes a row), the 16-byte columns of a row permuted by row mod 8.
template <bool swizzled>
__host__ __device__ constexpr uint32_t offset_of(int rows, int row, int k) {
  if (swizzled)
    return k / 64 * rows * 128 + row * 128 + (k % 64 / 8 ^ row % 8) * 16 + k % 8 * 2;
  return row / 8 * (kDepth * 16) + k / 8 * 128 + row % 8 * 16 + k % 8 * 2;
}

// Matrix descriptor: address, leading offset (between K-neighbouring core matrices; unused when
// swizzled) and stride offset (between groups of 8 rows), all in units of 16 bytes.
template <bool swizzled>
__device__ uint64_t descriptor(uint32_t address) {
  const uint64_t leading = swizzled ? 1 : 128 / 16;
  const uint64_t stride = swizzled ? 1024 / 16 : kDepth * 16 / 16;
  const uint64_t mode = swizzled ? 1 : 0;  // 1: 128-byte swizzle
  return (address >> 4 & 0x3fff) | leading << 16 | stride << 32 | mode << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define R4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define R8A R4(0, 1, 2, 3) ", " R4(4, 5, 6, 7)
#define R16A R8A ", " R4(8, 9, 10, 11) ", " R4(12, 13, 14, 15)
#define R32A R16A ", " R4(16, 17, 18, 19) ", " R4(20, 21, 22, 23) ", " R4(24, 25, 26, 27) ", " \
             R4(28, 29, 30, 31)
#define WGMMA(shape, sums, a, b)                                                        \
  "wgmma.mma_async.sync.aligned.m64n" shape "k16.f32.bf16.bf16 {" sums "}, " a ", " b

// d [N / 2] += A (64 x 16) B (16 x N); a and b are descriptors.
template <int N>
__device__ inline void wgmma(float* d, uint64_t a, uint64_t b) {
  if constexpr (N == 8)
    asm volatile(WGMMA("8", R4(0, 1, 2, 3), "%4", "%5, 1, 1, 1, 0, 0;") : D4(0) : "l"(a), "l"(b));
  else if constexpr (N == 16)
    asm volatile(WGMMA("16", R8A, "%8", "%9, 1, 1, 1, 0, 0;") : D4(0), D4(4) : "l"(a), "l"(b));
  else if constexpr (N == 32)
    asm volatile(WGMMA("32", R16A, "%16", "%17, 1, 1, 1, 0, 0;") : D16(0) : "l"(a), "l"(b));
  else
    asm volatile(WGMMA("64", R32A, "%32", "%33, 1, 1, 1, 0, 0;")
                 : D16(0), D16(16) : "l"(a), "l"(b));
}

// The same with this thread's part of A in registers.
template <int N>
__device__ inline void wgmma(float* d, const uint32_t* a, uint64_t b) {
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
  if constexpr (N == 8)
    asm volatile(WGMMA("8", R4(0, 1, 2, 3), "{" R4(4, 5, 6, 7) "}", "%8, 1, 1, 1, 0;")
                 : D4(0) : A4, "l"(b));
  else if constexpr (N == 16)
    asm volatile(WGMMA("16", R8A, "{" R4(8, 9, 10, 11) "}", "%12, 1, 1, 1, 0;")
                 : D4(0), D4(4) : A4, "l"(b));
  else if constexpr (N == 32)
    asm volatile(WGMMA("32", R16A, "{" R4(16, 17, 18, 19) "}", "%20, 1, 1, 1, 0;")
                 : D16(0) : A4, "l"(b));
  else
    asm volatile(WGMMA("64", R32A, "{" R4(32, 33, 34, 35) "}", "%36, 1, 1, 1, 0;")
                 : D16(0), D16(16) : A4, "l"(b));
}

__device__ inline void load_matrices(uint32_t* r, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ inline void mma(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : D4(0) : A4, "r"(b[0]), "r"(b[1]));
}

// a [kRows, kDepth], b [N, kDepth] row-major; out [grid, kRows, N]: `products` times the product.
template <Unit unit, Weights weights, int N, bool in_turn>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __nv_bfloat16* a, const __nv_bfloat16* b, int products, float* out) {
  constexpr bool swizzled = weights == kSharedSwizzled;
  constexpr int kPieces = kDepth / 8;  // of 16 bytes, in a row
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char* b_memory = memory + kRows * kDepth * 2;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads)
    *reinterpret_cast<uint4*>(memory + offset_of<swizzled>(kRows, i / kPieces, i % kPieces * 8)) =
        reinterpret_cast<const uint4*>(a)[i];
  for (int i = threadIdx.x; i < N * kPieces; i += kThreads)
    *reinterpret_cast<uint4*>(b_memory + offset_of<swizzled>(N, i / kPieces, i % kPieces * 8)) =
        reinterpret_cast<const uint4*>(b)[i];
  fence_async_proxy();  // wgmma reads through the async proxy what was just stored
  __syncthreads();

  const uint32_t a_address = shared_address(memory), b_address = shared_address(b_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // The rows of the four 8 x 8 matrices of a 16 x 16 block that ldmatrix.x4 fetches, in the order
  // in which mma and wgmma take A from registers.
  const int a_row = warp * 16 + lane % 16, a_column = lane / 16 * 8;
  constexpr int kHeld = weights == kRegisters ? kDepth / 16 : 1;
  uint32_t held[kHeld][4];
  if constexpr (weights == kRegisters) {
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      load_matrices(held[k], a_address + offset_of<swizzled>(kRows, a_row, 16 * k + a_column));
  }

  // mma.sync waits for its own sums: several independent chains where N gives too few.
  constexpr int kChains = unit == kWgmma || N >= 32 ? 1 : 32 / N;
  float d[kChains * N / 2] = {};
#pragma unroll 1  // each product reads its operands anew
  for (int product = 0; product < products; ++product) {
    if constexpr (unit == kWgmma) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint64_t b_block = descriptor<swizzled>(b_address + offset_of<swizzled>(N, 0, 16 * k));
        if constexpr (weights == kRegisters) {
          wgmma<N>(d, held[k], b_block);
        } else {
          wgmma<N>(d, descriptor<swizzled>(
                          a_address + offset_of<swizzled>(kRows, warp / 4 * 64, 16 * k)), b_block);
        }
      }
      wgmma_commit();
      if constexpr (in_turn) wgmma_wait<0>();
    } else {
      uint32_t columns[4];
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t fetched[4];
        if constexpr (weights != kRegisters)
          load_matrices(fetched, a_address + offset_of<swizzled>(kRows, a_row, 16 * k + a_column));
        const uint32_t* block = weights == kRegisters ? held[k % kHeld] : fetched;
        float* sums = d + k % kChains * (N / 2);
        if constexpr (N == 8) {  // one fetch of 8 rows x 32 columns serves two steps of k
          if (k % 2 == 0)
            load_matrices(columns,
                          b_address + offset_of<swizzled>(N, lane % 8, 16 * k + lane / 8 * 8));
          mma(sums, block, columns + k % 2 * 2);
        } else {
#pragma unroll
          for (int n = 0; n < N; n += 16) {
            load_matrices(columns, b_address + offset_of<swizzled>(N, n + lane / 16 * 8 + lane % 8,
                                                                   16 * k + lane / 8 % 2 * 8));
            mma(sums + n / 2, block, columns);
            mma(sums + n / 2 + 4, block, columns + 2);
          }
        }
      }
    }
    if constexpr (in_turn) __syncthreads();
  }
  if constexpr (unit == kWgmma) wgmma_wait<0>();

  // Both units spread sums alike: rows lane / 4 and + 8 of the warp's 16, two columns of every 8.
  float* mine = out + static_cast<size_t>(blockIdx.x) * kRows * N;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    for (int chain = 1; chain < kChains; ++chain) d[i] += d[chain * (N / 2) + i];
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    mine[row * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

struct Problem {
  std::vector<double> product;  // [kRows, N] for the largest N, row-major with that N
  __nv_bfloat16 *a, *b;
  float* out;
};
constexpr int kMostUsers = 64;

// a / b scaled so that the product is of order one.
Problem make_problem() {
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> a(kRows * kDepth), b(kMostUsers * kDepth);
  for (auto& value : a) value = __float2bfloat16(normal(random_engine()) / 16);
  for (auto& value : b) value = __float2bfloat16(normal(random_engine()));
  Problem problem;
  problem.product.assign(kRows * kMostUsers, 0.0);
  for (int row = 0; row < kRows; ++row)
    for (int n = 0; n < kMostUsers; ++n)
      for (int k = 0; k < kDepth; ++k)
        problem.product[row * kMostUsers + n] +=
            static_cast<double>(__bfloat162float(a[row * kDepth + k])) *
            static_cast<double>(__bfloat162float(b[n * kDepth + k]));
  problem.a = to_device(a);
  problem.b = to_device(b);
  problem.out = device_array<float>(static_cast<size_t>(multiprocessors()) * kRows * kMostUsers);
  return problem;
}

template <Unit unit, Weights weights, int N, bool in_turn>
void measure(const Problem& problem, std::vector<float>& first) {
  const auto kernel = multiply<unit, weights, N, in_turn>;
  const size_t shared_bytes = (kRows + N) * kDepth * 2;
  const int ctas = multiprocessors();
  allow(kernel, shared_bytes);
  auto run = [&](int products) {
    kernel<<<ctas, kThreads, shared_bytes>>>(problem.a, problem.b, products, problem.out);
    CHECK(cudaGetLastError());
  };
  const size_t count = static_cast<size_t>(ctas) * kRows * N;
  CHECK(cudaMemset(problem.out, 0xff, count * sizeof(float)));  // NaN where nothing is written
  run(1);
  const std::vector<float> got = to_host(problem.out, count);
  if (first.empty()) first = got;
  double error = 0, size = 0, difference = 0;
  for (size_t i = 0; i < count; ++i) {
    const double want = problem.product[i / N % kRows * kMostUsers + i % N];
    error += (got[i] - want) * (got[i] - want);
    difference += (got[i] - first[i]) * static_cast<double>(got[i] - first[i]);
    size += want * want;
  }
  error = std::sqrt(error / size);
  difference = std::sqrt(difference / size);
  const int products = 2000;
  const Timing time = time_us([&] { run(products); }, 10);
  const double flops = 2.0 * kRows * kDepth * N * ctas * products;
  Line line("small_product");
  line.put("unit", kUnits[unit]).put("weights", kWeights[weights]).put("n", N);
  line.put("mode", in_turn ? "one_at_a_time" : "in_a_row").put(time.per(products), "ns");
  line.put("tflop_s", 1e-6 * flops / time.median).put("relative_error", error);
  // The chains sum in another order than one chain, so equal means equal to fp32 rounding.
  line.put("difference_to_mma_sync", difference).verified(error < 1e-4 && difference < 1e-4);
  line.print();
}

template <int N>
void measure_all(const Problem& problem) {
  std::vector<float> first;
  measure<kMmaSync, kShared, N, true>(problem, first);
  measure<kMmaSync, kRegisters, N, true>(problem, first);
  measure<kWgmma, kShared, N, true>(problem, first);
  measure<kWgmma, kSharedSwizzled, N, true>(problem, first);
  measure<kWgmma, kRegisters, N, true>(problem, first);
  measure<kMmaSync, kShared, N, false>(problem, first);
  measure<kMmaSync, kRegisters, N, false>(problem, first);
  measure<kWgmma, kShared, N, false>(problem, first);
  measure<kWgmma, kSharedSwizzled, N, false>(problem, first);
  measure<kWgmma, kRegisters, N, false>(problem, first);
}

int main() {
  raise_clocks();
  const Problem problem = make_problem();
  measure_all<8>(problem);
  measure_all<16>(problem);
  measure_all<32>(problem);
  measure_all<64>(problem);
  return finish();
}
