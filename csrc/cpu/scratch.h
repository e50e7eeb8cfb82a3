// Per-thread working memory of the kernels.
//
// Not std::vector: an instantiation of it in a file compiled for AVX-512 would be shared by the linker
// with files compiled for any machine. Nothing that such a file makes may carry a public template's name.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mac_attn::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // `count` elements, not initialised, 64-byte aligned; valid until the same place is asked for again. Throws
  // std::bad_alloc.
  template <typename T>
  T* array(int place, int64_t count) {
    return static_cast<T*>(bytes(place, static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* bytes(int place, size_t size);

  static constexpr int kPlaces = 7;
  void* data_[kPlaces] = {};
  size_t size_[kPlaces] = {};
};

[[noreturn]] void throw_out_of_memory();

// Returns when `pending` is 0. Others that run will soon be done; where they wait for a core, it gives up its own.
void wait_for_zero(const std::atomic<int32_t>& pending);

// The calling thread's own, for a kernel: kept until the thread ends.
Scratch& thread_scratch();

}  // namespace mac_attn::cpu
