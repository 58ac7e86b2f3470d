// Fibers: stacks that take turns on one thread. Hand-written switches on x86-64, ucontext elsewhere; both tell
// AddressSanitizer which stack is in use.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace twin {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Starts anew with `body`, whatever this fiber was doing before: what lay on its stack is forgotten.
  void start(const std::function<void()>& body);
  // From the scheduler: run until the fiber yields or ends.
  void resume();
  // From inside the fiber: back to the scheduler.
  void yield();
  bool done() const { return done_; }

 private:
  struct Stack;
  static void entry(Fiber* self);
  std::unique_ptr<Stack> stack_;
  std::function<void()> body_;
  bool done_ = true;
};

}  // namespace twin
