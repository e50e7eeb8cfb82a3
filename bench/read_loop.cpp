// The bandwidth to compare with: every core reads its part of a buffer, 64 bytes at a time, and sums it.
#include <cstddef>
#include <cstdint>

typedef uint64_t vec __attribute__((vector_size(64)));

extern "C" uint64_t read_loop(const void* data, size_t bytes, int num_threads) {
  const vec* p = static_cast<const vec*>(data);
  const long count = static_cast<long>(bytes / sizeof(vec) / 8 * 8);
  uint64_t total = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : total) schedule(static)
  for (long begin = 0; begin < count; begin += 1 << 14) {
    const long end = begin + (1 << 14) < count ? begin + (1 << 14) : count;
    vec sum[8] = {};
    for (long i = begin; i < end; i += 8) {
      for (int j = 0; j < 8; ++j) {
        __builtin_prefetch(p + i + j + 64);
        sum[j] += p[i + j];
      }
    }
    for (int j = 0; j < 8; ++j) {
      for (int lane = 0; lane < 8; ++lane) total += sum[j][lane];
    }
  }
  return total;
}
