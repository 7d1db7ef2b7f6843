// A test's other tenant of the GPU: blocks that each fill an SM and spin on a stream of their own
// until they are told to stop, or for kPatience: a test that cannot get past them must fail, not
// hang.
#include <cuda_runtime.h>

#include <cstdio>

namespace {

constexpr int kThreads = 1024;
constexpr int kShared = 200 * 1024;  // no room beside it for a block that needs much

constexpr unsigned long long kPatience = 10'000'000'000;  // nanoseconds

volatile int* stop_flag = nullptr;  // in host memory that the device sees
int* arrived = nullptr;             // the same
cudaStream_t stream = nullptr;

__device__ unsigned long long Nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(kThreads) Spin(volatile int* stop, int* arrived) {
  if (threadIdx.x != 0) return;
  atomicAdd_system(arrived, 1);
  const unsigned long long start = Nanoseconds();
  while (!*stop && Nanoseconds() - start < kPatience) __nanosleep(200);
  if (!*stop) atomicAdd_system(arrived, -1);
}

int Report(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return 0;
  std::fprintf(stderr, "sm_holder: %s: %s\n", what, cudaGetErrorString(status));
  return 1;
}

}  // namespace

extern "C" {

// Holds `num_sms` SMs; returns 0 once all of them are held.
int sm_holder_start(int num_sms) {
  if (!stream) {
    if (Report("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking))) return 1;
    void* flags = nullptr;
    if (Report("flags", cudaHostAlloc(&flags, 2 * sizeof(int), cudaHostAllocMapped))) return 1;
    stop_flag = static_cast<volatile int*>(flags);
    arrived = static_cast<int*>(flags) + 1;
    if (Report("shared memory",
               cudaFuncSetAttribute(Spin, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared))) {
      return 1;
    }
  }
  *stop_flag = 0;
  *static_cast<volatile int*>(arrived) = 0;
  Spin<<<num_sms, kThreads, kShared, stream>>>(stop_flag, arrived);
  if (Report("launch", cudaGetLastError())) return 1;
  while (*static_cast<volatile int*>(arrived) < num_sms) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status != cudaErrorNotReady && Report("wait", status)) return 1;
  }
  return 0;
}

// Lets them go; returns 0 when they are gone and have held `num_sms` SMs until now.
int sm_holder_stop(int num_sms) {
  const bool held = *static_cast<volatile int*>(arrived) == num_sms;
  *stop_flag = 1;
  if (Report("stop", cudaStreamSynchronize(stream))) return 1;
  if (!held) std::fprintf(stderr, "sm_holder: they lost patience before the stop\n");
  return !held;
}

}  // extern "C"
