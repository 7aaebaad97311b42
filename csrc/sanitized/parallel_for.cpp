// Threads that sanitizers see, in place of torch's. Compiled beside csrc/cpu/ into the libraries that
// benchmarks/cpu_check/sanitizers.py makes, where it comes before torch's function of this name. torch's threads are
// OpenMP's, of whose begin and end ThreadSanitizer knows nothing.
//
// Each call has new threads, also for one portion. So a thread's scratch is as small as this call needs, and
// AddressSanitizer sees what goes beyond it. The grain is not kept to, so that small problems are shared out, too.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc func, void* ctx) {
  uint32_t threads = 1;
  if (const AOTITorchError error = torch_get_num_threads(&threads)) return error;
  const int64_t size = std::max<int64_t>((end - begin + threads - 1) / threads, 1);
  std::vector<std::thread> all;
  for (int64_t at = begin; at < end; at += size) all.emplace_back(func, at, std::min(at + size, end), ctx);
  for (std::thread& one : all) one.join();
  return AOTI_TORCH_SUCCESS;
}
