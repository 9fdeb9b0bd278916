// The Python module `_host` (test and tool builds): the emulator's controls, launch plans, and the emulator's own
// tests.
#include <pybind11/stl.h>

#include <vector>

#include "host/bindings.h"
#include "simt/simt.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::host {

Registrar* Registrar::first = nullptr;

namespace {

void set_options(uint64_t seed, uint32_t resident_blocks, uint32_t hold_back_percent, uint32_t max_grid,
                 uint64_t switches_without_progress) {
  if (resident_blocks == 0) throw std::invalid_argument("resident_blocks must be at least 1");
  if (hold_back_percent > 100) throw std::invalid_argument("hold_back_percent must be at most 100");
  if (max_grid == 0) throw std::invalid_argument("max_grid must be at least 1");
  simt::set_options({seed, resident_blocks, hold_back_percent, max_grid, switches_without_progress});
}

py::dict options() {
  const simt::Options options = simt::options();
  py::dict result;
  result["seed"] = options.seed;
  result["resident_blocks"] = options.resident_blocks;
  result["hold_back_percent"] = options.hold_back_percent;
  result["max_grid"] = options.max_grid;
  result["switches_without_progress"] = options.switches_without_progress;
  return result;
}

py::dict counters() {
  const simt::Counters counters = simt::counters();
  py::dict result;
  result["launches"] = counters.launches;
  result["blocks"] = counters.blocks;
  result["switches"] = counters.switches;
  result["held_stores"] = counters.held_stores;
  result["stale_loads"] = counters.stale_loads;
  return result;
}

py::list launched() {
  py::list result;
  for (const simt::Launched& one : simt::launched()) {
    py::dict entry;
    entry["library"] = one.library;
    entry["offset"] = one.offset;
    entry["grid"] = one.launch.grid.x;
    entry["threads"] = one.launch.block.x * one.launch.block.y;
    entry["shared_bytes"] = one.launch.shared_bytes;
    entry["cooperative"] = one.launch.cooperative;
    result.append(entry);
  }
  return result;
}

void register_multicast(uintptr_t address, size_t bytes, const std::vector<uintptr_t>& rank_addresses) {
  if (rank_addresses.empty() || rank_addresses.size() > simt::kMostMulticastRanks) {
    throw std::invalid_argument("rank_addresses must name 1 to " + std::to_string(simt::kMostMulticastRanks) +
                                " ranks");
  }
  uintptr_t bits = address | bytes;
  std::vector<void*> rank_begins;
  for (const uintptr_t rank_address : rank_addresses) {
    bits |= rank_address;
    rank_begins.push_back(reinterpret_cast<void*>(rank_address));
  }
  if (bytes == 0 || bits % 16 != 0)
    throw std::invalid_argument("addresses and bytes must be multiples of 16, bytes at least 16");
  simt::register_multicast(reinterpret_cast<void*>(address), bytes, rank_begins.data(),
                           static_cast<int>(rank_begins.size()));
}

void run_group() {
  char report[900];
  bool ok;
  {
    py::gil_scoped_release release;
    ok = simt::run_group(report, sizeof(report));
  }
  if (!ok) throw Fault(report);
}

void add_emulator(py::module_ m) {
  const simt::Options defaults;
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_options", &set_options, py::kw_only(), py::arg("seed") = defaults.seed,
        py::arg("resident_blocks") = defaults.resident_blocks,
        py::arg("hold_back_percent") = defaults.hold_back_percent, py::arg("max_grid") = defaults.max_grid,
        py::arg("switches_without_progress") = defaults.switches_without_progress,
        "Sets every option and starts the sequence of schedules anew: the same seed gives the same schedules.",
        py::call_guard<py::gil_scoped_release>());
  m.def("options", &options);
#if defined(__SANITIZE_ADDRESS__)
  m.attr("address_sanitizer") = true;
#else
  m.attr("address_sanitizer") = false;
#endif
  m.def("counters", &counters);
  m.def("launched", &launched, "Launches since set_options, oldest first: where the kernel stands, and its shape.");
  m.def(
      "register_peer_memory",
      [](uintptr_t address, size_t bytes) { simt::register_peer_memory(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"), "Memory that several ranks write: stores may be late, loads stale.",
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "unregister_peer_memory",
      [](uintptr_t address) { simt::unregister_peer_memory(reinterpret_cast<void*>(address)); }, py::arg("address"),
      py::call_guard<py::gil_scoped_release>());
  m.def("register_multicast", &register_multicast, py::arg("address"), py::arg("bytes"), py::arg("rank_addresses"),
        "An address range that stands for the same bytes of every rank's buffer, for multimem instructions only.",
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "unregister_multicast", [](uintptr_t address) { simt::unregister_multicast(reinterpret_cast<void*>(address)); },
      py::arg("address"), py::call_guard<py::gil_scoped_release>());
  m.def("begin_group", &simt::begin_group, "Launches from here on are queued, until run_group runs them together.");
  m.def("set_rank", &simt::set_rank, py::arg("rank"), "The rank that the next queued launches belong to.");
  m.def("run_group", &run_group, "Runs what was queued; raises Fault with the report if a launch failed.");
  m.def("discard_group", &simt::discard_group, "Forgets what was queued.");
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Tools for tests: the SIMT emulator, launch plans, test kernels.";
  add_emulator(m.def_submodule("simt"));
  for (const Registrar* registrar = Registrar::first; registrar != nullptr; registrar = registrar->next) {
    registrar->add(m);
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::host
