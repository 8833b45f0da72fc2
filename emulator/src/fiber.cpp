#include <sys/mman.h>

#include <cstdlib>
#include <utility>

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// void nxs_emulator_switch(void** save, void* load): keeps the callee-saved registers on the stack that is left.
asm(R"(
.text
.type nxs_emulator_switch, @function
nxs_emulator_switch:
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
.size nxs_emulator_switch, .-nxs_emulator_switch
)");
extern "C" void nxs_emulator_switch(void** save, void* load) asm("nxs_emulator_switch");
#endif

namespace nxs::emulator {

namespace {
constexpr size_t kGuard = 4096, kStack = 256 << 10;
thread_local Fiber* starting = nullptr;
}  // namespace

Fiber::~Fiber() {
  if (memory_) munmap(memory_, kGuard + kStack);
}

void Fiber::prepare(void (*body)(void*), void* argument) {
  void* memory =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  memory_ = static_cast<std::byte*>(memory);
  mprotect(memory_, kGuard, PROT_NONE);
  body_ = body;
  argument_ = argument;
#if defined(__x86_64__)
  // Six registers, then the address of start(); above it a zero return address ends backtraces. start() begins as after
  // a call: its stack pointer is 8 below a multiple of 16.
  void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack) - 3;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(&Fiber::start);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  stack_pointer_ = top - 7;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + kGuard;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#endif
}

void Fiber::arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &host_stack_, &host_size_);
#endif
}

void Fiber::start() {
  Fiber* fiber = std::exchange(starting, nullptr);
  fiber->arrived(nullptr);
  fiber->body_(fiber->argument_);
  abort();
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  void* host_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&host_fake_stack, memory_ + kGuard, kStack);
#endif
#if defined(__x86_64__)
  nxs_emulator_switch(&host_pointer_, stack_pointer_);
#else
  swapcontext(&host_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, host_stack_, host_size_);
#endif
#if defined(__x86_64__)
  nxs_emulator_switch(&stack_pointer_, host_pointer_);
#else
  swapcontext(&context_, &host_);
#endif
  arrived(fake_stack_);
}

}  // namespace nxs::emulator
