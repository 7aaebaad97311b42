// out[m][n] = sum over k of a[m][k] * b[n][k], fp16 to fp32, as Hopper's kernels are built: one warp brings tiles by
// TMA, two warpgroups multiply by wgmma. Full and empty mbarriers stand between them. For sm_90a.
#include <cstdint>

constexpr int kBlockM = 128, kBlockN = 64, kBlockK = 64, kStages = 3, kStageBytes = (kBlockM + kBlockN) * kBlockK * 2;
enum Fault { kNone, kNoFullWait, kNoEmptyWait };

struct alignas(64) TensorMap {
  char bytes[128];
};

__device__ uint32_t shared(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void copy_tile(uint32_t to, const TensorMap* map, int k, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}
// K-major, swizzled by 128 bytes: 1024 bytes from eight rows to the next.
__device__ uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
__device__ void multiply(float* d, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, "
      "0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

template <Fault kFault>
__device__ __forceinline__ void produce(const TensorMap& a, const TensorMap& b, uint32_t tiles, uint32_t full,
                                        uint32_t empty, int steps) {
  for (int k = 0; k < steps; ++k) {
    const int stage = k % kStages;
    if (kFault != kNoEmptyWait) wait(empty + 8 * stage, (k / kStages & 1) ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * stage), "r"(kStageBytes)
                 : "memory");
    const uint32_t to = tiles + stage * kStageBytes;
    copy_tile(to, &a, k * kBlockK, blockIdx.x * kBlockM, full + 8 * stage);
    copy_tile(to + kBlockM * kBlockK * 2, &b, k * kBlockK, blockIdx.y * kBlockN, full + 8 * stage);
  }
}

template <Fault kFault>
__device__ __forceinline__ void consume(float* d, int group, uint32_t tiles, uint32_t full, uint32_t empty, int steps) {
  for (int k = 0; k < steps; ++k) {
    const int stage = k % kStages;
    if (kFault != kNoFullWait) wait(full + 8 * stage, k / kStages & 1);
    const uint32_t a = tiles + stage * kStageBytes + group * 64 * kBlockK * 2;
    const uint32_t b = tiles + stage * kStageBytes + kBlockM * kBlockK * 2;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int part = 0; part < kBlockK / 16; ++part) multiply(d, descriptor(a + 32 * part), descriptor(b + 32 * part));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    if (threadIdx.x % 128 == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * stage) : "memory");
    }
  }
}

template <Fault kFault>
__device__ __forceinline__ void gemm(const TensorMap& a, const TensorMap& b, float* out, int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ uint64_t full[kStages], empty[kStages];
  const int group = threadIdx.x / 128, steps = (K + kBlockK - 1) / kBlockK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(&full[s])) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(shared(&empty[s])) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 256) produce<kFault>(a, b, shared(memory), shared(full), shared(empty), steps);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float d[32] = {};
  consume<kFault>(d, group, shared(memory), shared(full), shared(empty), steps);
  const int lane = threadIdx.x % 32, first = blockIdx.x * kBlockM + group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  for (int i = 0; i < 32; ++i) {
    const int row = first + 8 * (i / 2 % 2), column = blockIdx.y * kBlockN + 8 * (i / 4) + lane % 4 * 2 + i % 2;
    if (row < M && column < N) out[int64_t{row} * N + column] = d[i];
  }
}

#define KERNEL(name, fault)                                                                                        \
  extern "C" __global__ void __launch_bounds__(384, 1) name(                                                       \
      const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* out, int M, int N, int K) { \
    gemm<fault>(a, b, out, M, N, K);                                                                               \
  }
KERNEL(right, kNone)
KERNEL(no_full_wait, kNoFullWait)
KERNEL(no_empty_wait, kNoEmptyWait)
