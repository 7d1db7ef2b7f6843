// Times layers in CUDA graphs, without JAX: what two builds of the kernels are compared by
// (benchmarks/graphs.py runs it; `make graphs` builds it).
//
//   graphs FORMAT ACT_DTYPE SECONDS WORD... < cells
//
// The words are the scale words of a row, as many as the format has. A cell is a line "H I E k T
// tile_tokens". Answers each with a line: microseconds of a call, the median of graphs replayed for
// SECONDS, and a hash of y. Weights are random codes under one scale; routings are drawn uniformly,
// and several take turns (jax_w4moe/bench/layers.py says why).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "launch/fused_moe.h"
#include "launch/grouped_gemm_tiles.h"
#include "launch/prepare.h"

namespace jax_w4moe {
namespace {

void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Device memory of its own.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    Check(cudaMalloc(&data_, std::max<int64_t>(count, 1) * sizeof(T)), "allocating");
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
    Check(cudaMemcpy(data_, from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copying");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_;
};

__device__ uint32_t Mix(uint64_t x) {  // of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 31);
}

// What every row of a record has beside its codes, one after the other.
struct ScaleWords {
  int count;
  uint32_t words[3];  // at most (formats/formats.h)
};

__global__ void FillRecords(uint32_t* data, int64_t count, int record_words, ScaleWords scales) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const int at = static_cast<int>(i % record_words) - kCodeBytes / 4;
    data[i] = at < 0 ? Mix(i) : scales.words[at % scales.count];
  }
}

// bf16, uniform in (-1, 1).
__global__ void FillTokens(uint16_t* data, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const float value = static_cast<int32_t>(Mix(~i)) * 0x1p-31f;
    data[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

struct Cell {
  int hidden, intermediate, experts, top_k, tokens, tile;
};

// i32[T, k], k distinct experts a token.
std::vector<int> Route(const Cell& cell, int number) {
  std::mt19937 random(number * 65537 + cell.tokens);
  std::vector<int> ids(static_cast<size_t>(cell.tokens) * cell.top_k), all(cell.experts);
  for (int e = 0; e < cell.experts; ++e) all[e] = e;
  for (int t = 0; t < cell.tokens; ++t) {
    for (int k = 0; k < cell.top_k; ++k) {
      std::swap(all[k], all[k + random() % (cell.experts - k)]);
      ids[static_cast<size_t>(t) * cell.top_k + k] = all[k];
    }
  }
  return ids;
}

class Layer {
 public:
  Layer(const Cell& cell, Operands operands, const ScaleWords& scales)
      : experts_(Sizes(cell, operands)) {
    const int record = operands.RecordBytes();
    w13_ = Weights(experts_.w13_row_blocks * experts_.w13_k_blocks, record, scales);
    w2_ = Weights(experts_.w2_row_blocks * experts_.w2_k_blocks, record, scales);
    experts_.w13 = w13_->data();
    experts_.w2 = w2_->data();
  }
  bool IsFor(const Cell& cell) const {
    return experts_.hidden_size == cell.hidden && experts_.num_experts == cell.experts &&
           experts_.w2_k_blocks == (cell.intermediate + kRecordK - 1) / kRecordK;
  }
  const Experts& experts() const { return experts_; }

 private:
  static Experts Sizes(const Cell& cell, Operands operands) {
    Experts e{};
    e.operands = operands;
    e.num_experts = cell.experts;
    e.hidden_size = cell.hidden;
    e.w13_k_blocks = (cell.hidden + kRecordK - 1) / kRecordK;
    e.w2_k_blocks = (cell.intermediate + kRecordK - 1) / kRecordK;
    e.w13_row_blocks = 4 * e.w2_k_blocks;
    e.w2_row_blocks = (cell.hidden + kRecordRows - 1) / kRecordRows;
    e.activation = {ActivationKind::kSwiGlu, {1.0f, 0.0f, INFINITY}};
    return e;
  }
  std::unique_ptr<Buffer<uint32_t>> Weights(int64_t records, int record, const ScaleWords& scales) {
    const int64_t words = experts_.num_experts * records * (record / 4);
    auto buffer = std::make_unique<Buffer<uint32_t>>(words);
    FillRecords<<<2048, 256>>>(buffer->data(), words, record / 4, scales);
    return buffer;
  }

  Experts experts_;
  std::unique_ptr<Buffer<uint32_t>> w13_, w2_;
};

void Time(const Cell& cell, const Layer& layer, double seconds) {
  const int64_t pairs = int64_t{cell.tokens} * cell.top_k;
  const int64_t elements = int64_t{cell.tokens} * cell.hidden;
  const int routings = cell.tokens <= 64 ? 8 : cell.tokens <= 1024 ? 4 : 2;
  std::vector<int> all_ids;
  for (int r = 0; r < routings; ++r) {
    const std::vector<int> ids = Route(cell, r);
    all_ids.insert(all_ids.end(), ids.begin(), ids.end());
  }
  const Buffer<int> ids(all_ids);
  const Buffer<float> weights(std::vector<float>(pairs, 1.0f / cell.top_k));
  const Buffer<uint16_t> x(elements), y(elements);
  FillTokens<<<1024, 256>>>(x.data(), elements);

  FusedMoeParams p{};
  p.x = x.data();
  p.experts = layer.experts();
  p.experts.tile_tokens = cell.tile;
  p.topk_ids = ids.data();
  p.topk_weights = weights.data();
  p.y = y.data();
  p.num_tokens = cell.tokens;
  p.top_k = cell.top_k;
  const Buffer<uint8_t> workspace(FusedMoeWorkspaceBytes(p));
  p.workspace = workspace.data();

  cudaStream_t stream;
  Check(cudaStreamCreate(&stream), "making a stream");
  Check(LaunchFusedMoe(p, stream), "launching");
  Check(cudaStreamSynchronize(stream), "running");
  std::vector<uint16_t> result(elements);
  Check(cudaMemcpy(result.data(), y.data(), elements * 2, cudaMemcpyDeviceToHost), "copying");
  uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (const uint16_t value : result) hash = (hash ^ value) * 1099511628211ull;

  constexpr int kCalls = 8;  // of a graph
  cudaGraph_t graph;
  cudaGraphExec_t program;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
  for (int call = 0; call < kCalls; ++call) {
    p.topk_ids = ids.data() + call % routings * pairs;
    Check(LaunchFusedMoe(p, stream), "launching");
  }
  Check(cudaStreamEndCapture(stream, &graph), "capturing");
  Check(cudaGraphInstantiate(&program, graph, 0), "making a graph");
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "making an event");
  Check(cudaEventCreate(&end), "making an event");
  for (int i = 0; i < 3; ++i) Check(cudaGraphLaunch(program, stream), "replaying");
  std::vector<float> times;
  for (double total = 0; total < seconds * 1e3 || times.size() < 5; total += times.back()) {
    Check(cudaEventRecord(begin, stream), "timing");
    Check(cudaGraphLaunch(program, stream), "replaying");
    Check(cudaEventRecord(end, stream), "timing");
    Check(cudaEventSynchronize(end), "running");
    times.push_back(0);
    Check(cudaEventElapsedTime(&times.back(), begin, end), "timing");
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  std::printf("%.3f %016llx\n", times[times.size() / 2] / kCalls * 1e3,
              static_cast<unsigned long long>(hash));
  std::fflush(stdout);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(program);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

int Main(int argc, char** argv) {
  WeightFormat format;
  if (argc < 4 || !FindFormat(argv[1], &format)) {
    std::fprintf(stderr, "usage: graphs FORMAT ACT_DTYPE SECONDS WORD... < cells\n");
    return 2;
  }
  const Operands operands{format, std::strcmp(argv[2], "bfloat16") == 0};
  ScaleWords scales{(operands.RecordBytes() - kCodeBytes) / (4 * kRecordRows), {}};
  if (argc != 4 + scales.count) {
    std::fprintf(stderr, "%d scale words, need the %d of %s\n", argc - 4, scales.count, argv[1]);
    return 2;
  }
  for (int i = 0; i < scales.count; ++i) {
    scales.words[i] = static_cast<uint32_t>(std::strtoul(argv[4 + i], nullptr, 0));
  }
  Check(PrepareGroupedGemm(operands), "raising the shared-memory limit");
  std::unique_ptr<Layer> layer;
  Cell cell;
  while (std::scanf("%d %d %d %d %d %d", &cell.hidden, &cell.intermediate, &cell.experts,
                    &cell.top_k, &cell.tokens, &cell.tile) == 6) {
    if (!HasTile(cell.tile, operands)) {
      std::fprintf(stderr, "no tile of %d tokens is compiled\n", cell.tile);
      return 2;
    }
    if (!layer || !layer->IsFor(cell)) {
      layer.reset();  // before the next one is made: memory
      layer = std::make_unique<Layer>(cell, operands, scales);
    }
    Time(cell, *layer, std::atof(argv[3]));
  }
  return 0;
}

}  // namespace
}  // namespace jax_w4moe

int main(int argc, char** argv) { return jax_w4moe::Main(argc, argv); }
