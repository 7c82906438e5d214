// A fiber: a stack to switch to and back from. Runs the threads of cuda_on_cpu.cpp.
#pragma once

#include <cstddef>

#include "guarded.h"

#if !defined(__x86_64__) || defined(FIBER_UCONTEXT)
#include <ucontext.h>
#define FIBER_SWITCH 0
#else
#define FIBER_SWITCH 1
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#if FIBER_SWITCH
// Saves callee-saved registers, switches stacks, and restores them from the new stack.
extern "C" void fiber_switch(void** save_stack, void* stack);
asm(R"(
.pushsection .text.fiber_switch, "axG", @progbits, fiber_switch, comdat
.weak fiber_switch
.hidden fiber_switch
.type fiber_switch, @function
fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fiber_switch, . - fiber_switch
.popsection
)");
#endif

// A context of execution; one of them is the OS thread's own stack.
class Fiber {
 public:
  // Enough for large arrays in unoptimised and sanitized code; only pages in use become memory.
  static constexpr size_t kStack = 256 << 10;  // bytes

  // The next switch to this fiber calls entry(), which must never return. `colour` staggers the tops of the stacks, so
  // that they do not share a few cache lines.
  void start(void (*entry)(), int colour) {
    if (!stack_) stack_ = map_guarded(kStack);
    size_ = kStack;
    fake_stack_ = nullptr;
    const size_t used = kStack - size_t(colour) * 192 % 4096;
#if FIBER_SWITCH
    void** top = reinterpret_cast<void**>(stack_ + used);
    *--top = nullptr;  // a function starts 8 bytes below a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    context_ = top - 6;  // registers
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = used;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves this fiber for another one; for good if `at_end`.
  void switch_to(Fiber& other, bool at_end = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(at_end ? nullptr : &fake_stack_, other.stack_, other.size_);
#else
    (void)at_end;
#endif
#if FIBER_SWITCH
    fiber_switch(&context_, other.context_);
#else
    swapcontext(&context_, &other.context_);
#endif
    arrived(*this, other);
  }

  // Call once on the new stack, with the fiber that switched to it.
  void begin(Fiber& from) { arrived(*this, from); }

  const char* stack() const { return stack_; }

 private:
  // The sanitizer tells where the stack that was left lies, which is otherwise unknown for the OS thread's own.
  static void arrived(Fiber& here, Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    __sanitizer_finish_switch_fiber(here.fake_stack_, &stack, &from.size_);
    from.stack_ = static_cast<char*>(const_cast<void*>(stack));
#else
    (void)here, (void)from;
#endif
  }

  char* stack_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
#if FIBER_SWITCH
  void* context_ = nullptr;
#else
  ucontext_t context_;
#endif
};
