// Fibers: a stack of its own for each CUDA thread, all on the host thread that launches.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace nxs::emulator {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes resume() start at body(argument), which must never return.
  void prepare(void (*body)(void*), void* argument);
  // Called from the host thread: runs the fiber until it suspends.
  void resume();
  // Called from the fiber: back to where resume() was called.
  void suspend();
  bool prepared() const { return memory_; }

 private:
  static void start();
  void arrived(void* fake_stack);

  std::byte* memory_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
  void* host_pointer_ = nullptr;
#else
  ucontext_t context_, host_;
#endif
  // AddressSanitizer keeps a shadow of each stack and wants to know of every switch.
  void* fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
};

}  // namespace nxs::emulator
