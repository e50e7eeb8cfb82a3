// The few lines that the tests here need of a test framework.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#define MAC_SIMT_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define MAC_SIMT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MAC_SIMT_ASAN 1
#elif __has_feature(thread_sanitizer)
#define MAC_SIMT_TSAN 1
#endif
#endif

namespace mac_attn::simt {

inline int failed_checks = 0;

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++::mac_attn::simt::failed_checks;                                    \
    }                                                                       \
  } while (false)

// Both engines; the second is slow, and its schedule is the operating system's.
struct Run {
  Engine engine;
  uint64_t seed;
};
// ThreadSanitizer is slow, and sees a missing barrier in any schedule, with any numbers: each manner of choosing
// (fiber_scheduler.cpp) once, and each instantiation with fewer shapes.
#if defined(MAC_SIMT_TSAN)
constexpr bool kFewShapes = true;
#else
constexpr bool kFewShapes = false;
#endif
inline std::vector<Run> all_runs(uint64_t seeds = kFewShapes ? 4 : 20) {
  std::vector<Run> runs = {{Engine::kThreads, 1}};
  for (uint64_t seed = 0; seed < seeds; ++seed) runs.push_back({Engine::kFibers, seed});
  return runs;
}

// The message of the Failure that a launch ends with, empty if it ends well.
template <typename Launch>
std::string failure_of(const Launch& launch) {
  try {
    launch();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int test_result(const char* name) {
  std::printf("%s: %s\n", name, failed_checks == 0 ? "all checks passed" : "FAILED");
  return failed_checks == 0 ? 0 : 1;
}

}  // namespace mac_attn::simt
