// The library's two exports. Loading it registers nothing: _library.py reads the schemas, compares, then registers.
#include "torch/registry.h"

#include <string>

namespace tokenweave::inline TOKENWEAVE_BACKEND {

Registration* Registration::first = nullptr;

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND

#define TOKENWEAVE_EXPORT extern "C" __attribute__((visibility("default")))

// One schema a line.
TOKENWEAVE_EXPORT const char* tokenweave_schemas() {
  static const std::string text = [] {
    std::string lines;
    for (auto* op = tokenweave::Registration::first; op != nullptr; op = op->next)
      lines += std::string(op->schema) + "\n";
    return lines;
  }();
  return text.c_str();
}

// Registers every op of this library with torch's dispatcher, once; they live until the process ends.
TOKENWEAVE_EXPORT void tokenweave_register() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, tokenweave::kOpNamespace, tokenweave::kDispatchKey, __FILE__,
                               __LINE__);
  static const bool registered = [] {
    for (auto* op = tokenweave::Registration::first; op != nullptr; op = op->next) {
      const std::string schema = op->schema;
      library.impl(schema.substr(0, schema.find('(')).c_str(), op->function);
    }
    return true;
  }();
  (void)registered;
}
