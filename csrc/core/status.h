// How a launcher reports: a value, never an exception and never an exit. Only the torch glue turns it into a raise.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace tokenweave::inline TOKENWEAVE_BACKEND {

class [[nodiscard]] Status {
 public:
  static Status ok() { return Status(); }

  [[gnu::format(printf, 1, 2)]] static Status error(const char* format, ...) {
    Status status;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(status.message_, sizeof(status.message_), format, arguments);
    va_end(arguments);
    return status;
  }

  bool is_ok() const { return message_[0] == '\0'; }
  const char* message() const { return message_; }

 private:
  Status() { message_[0] = '\0'; }
  char message_[1024];
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
