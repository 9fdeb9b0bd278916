// How an op's glue announces its implementation: TOKENWEAVE_OP(schema, function). The schema text is the one of the
// Python side, letter for letter; the compiler checks it against the function's C++ type here, and _library.py checks
// it against its own text before anything is registered, because a disagreement would be a crash at the first call and
// not an error.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "torch/backend.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

using BoxedFunction = void (*)(StableIValue*, uint64_t, uint64_t);

struct Registration {
  Registration(const char* schema_text, BoxedFunction boxed_function)
      : schema(schema_text), function(boxed_function), next(first) {
    first = this;
  }
  const char* schema;  // "name(Tensor x, ...) -> Tensor"
  BoxedFunction function;
  Registration* next;
  static Registration* first;
};

namespace schema_check {

// The schema type each C++ parameter type stands for.
template <class T>
constexpr std::string_view schema_type() {
  if constexpr (std::is_same_v<T, Tensor>) {
    return "Tensor";
  } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    return "Tensor?";
  } else if constexpr (std::is_same_v<T, double>) {
    return "float";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "int";
  } else {
    static_assert(std::is_same_v<T, bool>, "a parameter type that no schema type stands for");
    return "bool";
  }
}

// "Tensor(a!) x" -> "Tensor"; "Tensor? bias" -> "Tensor?"; "float eps" -> "float".
constexpr bool type_matches(std::string_view declaration, std::string_view type) {
  while (!declaration.empty() && declaration.front() == ' ') declaration.remove_prefix(1);
  if (!declaration.starts_with(type)) return false;
  declaration.remove_prefix(type.size());
  if (!declaration.empty() && declaration.front() == '(') {
    const size_t close = declaration.find(')');
    if (close == std::string_view::npos) return false;
    declaration.remove_prefix(close + 1);
  }
  return declaration.empty() || declaration.front() == ' ';
}

// Takes the next comma-separated item; commas inside parentheses do not occur in the types above.
constexpr std::string_view next_item(std::string_view& list) {
  const size_t comma = list.find(',');
  const std::string_view item = list.substr(0, comma);
  list.remove_prefix(comma == std::string_view::npos ? list.size() : comma + 1);
  return item;
}

template <class Return>
constexpr bool returns_match(std::string_view returns) {
  if constexpr (std::is_void_v<Return>) {
    return returns == "()";
  } else {
    return type_matches(returns, schema_type<Return>());
  }
}

template <class Return>
struct Returns {
  static constexpr bool match(std::string_view text) { return returns_match<Return>(text); }
};
template <class... Items>
struct Returns<std::tuple<Items...>> {
  static constexpr bool match(std::string_view text) {
    if (!text.starts_with('(') || !text.ends_with(')')) return false;
    text = text.substr(1, text.size() - 2);
    return (type_matches(next_item(text), schema_type<Items>()) && ...) && text.empty();
  }
};

template <class Return, class... Parameters>
constexpr bool matches(std::string_view schema, Return (*)(Parameters...)) {
  const size_t arrow = schema.find(" -> ");
  const size_t open = schema.find('(');
  if (arrow == std::string_view::npos || open == std::string_view::npos || open > arrow) return false;
  std::string_view parameters = schema.substr(open + 1, arrow - open - 2);
  const bool parameters_match =
      (type_matches(next_item(parameters), schema_type<std::remove_cvref_t<Parameters>>()) && ...);
  return parameters_match && parameters.empty() && Returns<Return>::match(schema.substr(arrow + 4));
}

}  // namespace schema_check

#define TOKENWEAVE_OP(schema, function)                                                             \
  static_assert(::tokenweave::schema_check::matches(schema, &function),                             \
                "the schema does not describe this function's parameters and returns: " #function); \
  static const ::tokenweave::Registration registration_of_##function(schema, TORCH_BOX(&function))

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
