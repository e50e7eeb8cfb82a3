#include "scratch.h"

#include <cstdlib>
#include <new>

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
    if (!data_[place]) throw std::bad_alloc();
    size_[place] = rounded;
  }
  return data_[place];
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace mac_attn::cpu
