#include "fiber.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

namespace mac_attn::simt {

namespace {

constexpr size_t kStackBytes = 512 * 1024;  // reserved, not touched; ASan's frames are large

// The C library's own: the sanitizers replace _longjmp by one that takes every jump for an unwinding within
// one stack.
using LongJump = void (*)(jmp_buf, int);
LongJump find_long_jump() {
  void* libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = libc ? dlsym(libc, "_longjmp") : nullptr;
  return symbol ? reinterpret_cast<LongJump>(symbol) : reinterpret_cast<LongJump>(&_longjmp);
}
const LongJump long_jump = find_long_jump();

// The stack of the calling thread. Asked once: glibc reads /proc/self/maps for the main thread's.
void find_stack(const void*& bottom, size_t& size) {
  static thread_local void* stack = nullptr;
  static thread_local size_t bytes = 0;
  if (!stack) {
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
  }
  bottom = stack;
  size = bytes;
}

constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber: a switch orders nothing

}  // namespace

void Fiber::enter(unsigned high, unsigned low) {
  auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  fiber->entry_(fiber->argument_);
  std::abort();
}

Fiber::~Fiber() {
  // TSan's part is left to it: destroying the fiber would be a switch of its own.
  if (mapping_) munmap(mapping_, kStackBytes + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

void Fiber::start(void (*entry)(void*), void* argument) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (!mapping_) {
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::perror("simt: no stack for a fiber");
      std::abort();
    }
    mapping_ = static_cast<char*>(memory);
    stack_ = mapping_ + page;
    stack_size_ = kStackBytes;
    if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0);
  } else {
    unpoison(stack_, stack_size_);  // of frames that were given up
  }
  entry_ = entry;
  argument_ = argument;
  entered_ = false;
  fake_stack_ = nullptr;
  getcontext(&context_);
  context_.uc_stack.ss_sp = mapping_ + page;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  const auto bits = reinterpret_cast<uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(bits >> 32),
              static_cast<unsigned>(bits));
}

__attribute__((noinline)) void Fiber::switch_from(Fiber& from, bool for_good) {
  if (!from.stack_) {
    find_stack(from.stack_, from.stack_size_);
    if (__tsan_get_current_fiber) from.tsan_ = __tsan_get_current_fiber();
  }
  if (_setjmp(from.jump_) == 0) {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(tsan_, kNoSync);
    if (__sanitizer_start_switch_fiber) {
      __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, stack_, stack_size_);
    }
    if (entered_) long_jump(jump_, 1);
    entered_ = true;
    setcontext(&context_);
  }
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
}

}  // namespace mac_attn::simt
