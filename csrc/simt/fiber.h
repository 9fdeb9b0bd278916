// Fibers: many stacks on one OS thread, and the switch between them. Written by hand because ucontext makes two system
// calls per switch, which costs twenty times the switch itself.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

namespace simt {

// A suspended flow of control. The bounds are for AddressSanitizer, which must be told of every switch.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Suspends `from` and resumes `to`; returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

// To be called first by the entry function of a fiber; `came_from` learns its bounds if it does not know them (the OS
// thread's own stack).
void finish_first_switch(Context& came_from);

// All stacks of the emulator in one mapping: one each would exceed the kernel's limit on mappings. There is no guard
// page for the same reason; a canary at the low end of each stack shows an overflow when the thread ends.
class StackSlab {
 public:
#if defined(SIMT_ASAN)
  static constexpr size_t kStackBytes = 256 * 1024;  // redzones make frames several times larger
#else
  static constexpr size_t kStackBytes = 64 * 1024;
#endif

  // Number of stacks, mapped at first use; 0 if the system refuses.
  size_t capacity();

  // Makes `context` start in entry() on stack `index` at its first switch. entry must never return.
  void prepare(Context& context, size_t index, void (*entry)());
  bool canary_intact(size_t index) const;

  // After a fiber was abandoned in the middle: forgets its frames; true if its stack had overflowed.
  bool repair(size_t index);
  // Returns the memory of the stacks from `count` on to the system.
  void release_beyond(size_t count);

 private:
  char* low_end(size_t index) const { return base_ + index * kStackBytes; }
  void write_canary(size_t index);

  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t canaries_ = 0;  // stacks [0, canaries_) have one: touching the low page of every stack each time would be slow
};

}  // namespace simt
