// Kernels that are wrong, each in one way that a GPU may let pass.
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

enum Fault {
  kNone,
  kUnwritten,
  kNoBarrier,
  kWrittenAgain,
  kBeyondShared,
  kBeyondStatic,
  kBeyondTensor,
  kInput,
  kMisaligned,
  kBranch,
  kEarly,
  kHalf,
};

// out[i] = in[its neighbour], through shared memory; 64 threads and as many numbers.
__global__ void copy_neighbours(Fault fault, const float* in, float* out) {
  extern __shared__ float shared[];
  __shared__ float sums[2];
  const int i = threadIdx.x;
  if (fault == kEarly && i == 63) return;
  if (fault != kUnwritten || i != 5) shared[fault == kBeyondShared ? i + 1 : i] = in[i];
  if (fault == kBranch && i < 32) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  float sum = shared[i ^ 1];
  if (fault != kHalf || i % 32 < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 8);
  if (fault == kWrittenAgain) shared[i] = sum;
  if (i % 32 == 0) sums[fault == kBeyondStatic ? i / 16 : i / 32] = sum;
  __syncthreads();
  if (fault == kInput) const_cast<float*>(in)[i] = sum;
  if (fault == kMisaligned) *reinterpret_cast<double*>(out + 1) = sum;
  out[fault == kBeyondTensor ? i + 1 : i] = shared[i ^ 1];
}

std::string error;

}  // namespace

// What is found; nothing where nothing is wrong.
extern "C" __attribute__((visibility("default"))) const char* fault(int which, const float* in, float* out) {
  cuda_on_cpu::DeviceGuard guard(0);
  cuda_on_cpu::lend(in, 64 * sizeof(float), false);
  cuda_on_cpu::lend(out, 64 * sizeof(float), true);
  error.clear();
  try {
    copy_neighbours<<<2, 64, 64 * sizeof(float), nullptr>>>(static_cast<Fault>(which), in, out);
  } catch (const std::exception& found) {
    error = found.what();
  }
  return error.c_str();
}
