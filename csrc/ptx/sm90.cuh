// Single PTX instructions of SM90 that CuTe has no wrapper for, or not with the operands we need.
#pragma once

#include <cstdint>

namespace jax_w4moe::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// L2 eviction policies in the encoding of createpolicy (PTX ISA, "Cache eviction priority hints").
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;  // weights: once per step
inline constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

// threadIdx.x, read again: what is computed from it is not kept in registers from before.
__device__ __forceinline__ int FreshThreadIndex() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// A value that is equal in all lanes of the warp, in a form that the compiler knows to be so: what
// follows from it may live in uniform registers, where WGMMA takes its descriptors from.
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(~0u, value, 0); }

// The value, of an origin that the compiler does not know: it is kept, not computed again.
__device__ __forceinline__ uint32_t Opaque(uint32_t value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

// cp.async.bulk of `bytes` (a multiple of 16) from global to shared, signalling an mbarrier.
__device__ __forceinline__ void BulkCopy(uint32_t shared, const void* global, uint32_t bytes,
                                         uint32_t mbarrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(mbarrier), "l"(policy)
      : "memory");
}

// cp.async of 4 bytes from global to shared, and the wait for all that this thread has issued.
__device__ __forceinline__ void CopyAsync4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void CopyAsyncWait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for `bytes` (a multiple of 16) to be brought to L2.
__device__ __forceinline__ void PrefetchToL2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// Programmatic dependent launch. Both do nothing in a kernel launched without it.
// Returns once the kernels before this one on the stream are complete and visible.
__device__ __forceinline__ void WaitForPrecedingKernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Lets the next kernel on the stream start where there is room; it waits as above.
__device__ __forceinline__ void LaunchDependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Counts in global memory that one kernel tells another by: what the threads of this one's block or
// warp wrote before their last barrier can be read by who has read the count it added to.
// Predicated: a branch there costs the warpgroups that multiply registers.
__device__ __forceinline__ void AddOneRelease(int* count, bool is_one) {
  asm volatile(
      "{\n"
      ".reg .pred is_one;\n"
      "setp.ne.u32 is_one, %1, 0;\n"
      "@is_one red.release.gpu.global.add.s32 [%0], 1;\n"
      "}" ::"l"(count),
      "r"(static_cast<uint32_t>(is_one))
      : "memory");
}
__device__ __forceinline__ int LoadAcquire(const int* count) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
  return now;
}

// Bulk copies that this thread asks for from here on read what it could read itself.
__device__ __forceinline__ void GlobalProxyFence() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void BarrierInit(uint32_t mbarrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals));
}

// Makes initialised barriers visible to the asynchronous proxy.
__device__ __forceinline__ void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArriveExpect(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void BarrierArrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

__device__ __forceinline__ void BarrierWait(uint32_t mbarrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
}

// Makes what this thread has stored to shared memory visible to the asynchronous proxy, WGMMA.
__device__ __forceinline__ void SharedStoreFence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void StoreShared128(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void StoreShared32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t LoadShared32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// A named barrier among `threads` threads of the block; id 0 is __syncthreads.
__device__ __forceinline__ void NamedBarrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Minimum and maximum that keep a NaN, as jax.numpy's do (fminf and fmaxf drop it).
__device__ __forceinline__ float MinNan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float MaxNan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^x and 1 / x to about 2^-22; what is below 2^-126 becomes 0.
__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float Reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// To a relative error of 2^-11.
__device__ __forceinline__ float Tanh(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The upper half of a word, as a dot product of its halves with 0 and 1: a shift would take the
// integer pipe, which has most to do where codes are decoded.
__device__ __forceinline__ uint32_t UpperHalf(uint32_t word) {
  return __dp2a_lo(word, 0x0100u, 0u);
}

// prmt.b32 without the selector mask that __byte_perm inserts.
__device__ __forceinline__ uint32_t Permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

__device__ __forceinline__ uint4 LoadShared128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 LoadShared64(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

// Stores 8x8 matrices of 16-bit values, held as accumulator fragments, by columns: lane i of the
// first 8 (16 for two matrices) gives the address of 16 bytes, column i % 8 of matrix i / 8.
__device__ __forceinline__ void StoreMatrixTransposed(uint32_t address, uint32_t fragment) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address),
               "r"(fragment)
               : "memory");
}
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t address, uint32_t first,
                                                        uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(first), "r"(second)
               : "memory");
}

}  // namespace jax_w4moe::ptx
