// Coverage of code that GCC compiled with -fsanitize-coverage=trace-pc, for the libFuzzer inside atheris, which
// expects Clang's counters: every basic block adds one to a counter chosen by its address. To be preloaded.
#include <cstdint>

namespace {

constexpr uintptr_t kCounters = 1 << 16;

struct PcEntry {
  uintptr_t pc;
  uintptr_t flags;
};

uint8_t counters[kCounters];
PcEntry entries[kCounters];

}  // namespace

extern "C" {

void __sanitizer_cov_trace_pc() {
  auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  pc ^= pc >> 16;
  ++counters[pc % kCounters];
}

// The counters, and made-up addresses of the blocks that they stand for: what libFuzzer's
// __sanitizer_cov_8bit_counters_init and __sanitizer_cov_pcs_init take as [begin, end).
uint8_t* mac_attn_counters() {
  return counters;
}
void* mac_attn_entries() {
  for (uintptr_t i = 0; i < kCounters; ++i) entries[i] = {i + 1, 0};
  return entries;
}
int mac_attn_num_counters() {
  return kCounters;
}
}
