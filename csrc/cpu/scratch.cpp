#include "scratch.h"

#include <cstdlib>
#include <new>
#include <thread>

namespace mac_attn::cpu {

Scratch::~Scratch() {
  for (void* data : data_) std::free(data);
}

void* Scratch::bytes(int place, size_t size) {
  if (size > size_[place]) {
    std::free(data_[place]);
    size_[place] = 0;
    const size_t rounded = (size + 63) / 64 * 64;
    data_[place] = std::aligned_alloc(64, rounded);
    if (!data_[place]) throw_out_of_memory();
    size_[place] = rounded;
  }
  return data_[place];
}

void throw_out_of_memory() {
  throw std::bad_alloc();
}

void wait_for_zero(const std::atomic<int32_t>& pending) {
  constexpr int kSpins = 2000;  // some tens of microseconds
  for (int i = 0; pending.load(std::memory_order_acquire) > 0; ++i) {
    if (i >= kSpins) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace mac_attn::cpu
