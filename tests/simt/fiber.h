// One flow of control with a stack of its own.
//
// A fiber is entered by ucontext and left and resumed by _setjmp and _longjmp, as QEMU's coroutines are: unlike
// swapcontext these make no system call (10 ns against 300 ns). ASan and TSan are told of every switch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace mac_attn::simt {

class Fiber {
 public:
  Fiber() = default;  // the caller's own flow, once it switches away from it
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes this a new flow that runs `entry(argument)`, which must never return. May be called again when the
  // flow is no longer needed, wherever it stands.
  void start(void (*entry)(void* argument), void* argument);

  // Leaves `from`, which must be the running one, and continues this one. `for_good`: `from` is not resumed
  // before it is started anew.
  void switch_from(Fiber& from, bool for_good = false);

 private:
  static void enter(unsigned high, unsigned low);

  jmp_buf jump_;
  ucontext_t context_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool entered_ = true;
  char* mapping_ = nullptr;  // guard page, then the stack
  const void* stack_ = nullptr;
  size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;  // ASan's
  void* tsan_ = nullptr;
};

}  // namespace mac_attn::simt
