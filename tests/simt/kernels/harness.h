// How a test kernel is launched from Python: memory by address, the GIL released, a report raised as a Fault.
#pragma once

#include "core/launch.h"
#include "host/bindings.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::host {

template <class... Parameters, class... Arguments>
void run_kernel(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
  Status status = Status::ok();
  {
    py::gil_scoped_release release;
    status = launch(config, {}, kernel, static_cast<Parameters>(arguments)...);
  }
  raise_unless_ok(status);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::host
