// memkern._C: what needs Python objects and no tensors. Optional at run time; the operators work without it.
#include <pybind11/pybind11.h>

#include <ctime>
#include <stdexcept>
#include <string>

#include "build_info.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
namespace cpu = memkern::cpu;

namespace {

constexpr cpu::Isa kIsas[] = {cpu::Isa::kDefault, cpu::Isa::kAvx2, cpu::Isa::kAvx512};

py::dict build_info() { return py::module_::import("json").attr("loads")(MK_BUILD_INFO); }

// The features that kernels of this package use or may come to use, by /proc/cpuinfo's names as gcc spells them.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) && defined(__GNUC__)
#define MK_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  MK_FEATURE("sse4.2");
  MK_FEATURE("avx");
  MK_FEATURE("avx2");
  MK_FEATURE("fma");
  MK_FEATURE("f16c");
  MK_FEATURE("bmi");
  MK_FEATURE("bmi2");
  MK_FEATURE("avx512f");
  MK_FEATURE("avx512bw");
  MK_FEATURE("avx512vl");
  MK_FEATURE("avx512dq");
  MK_FEATURE("avx512vnni");
  MK_FEATURE("avx512bf16");
#undef MK_FEATURE
#endif
  return features;
}

py::list cpu_isas() {
  py::list names;
  for (cpu::Isa isa : kIsas) {
    if (cpu::isa_available(isa)) names.append(cpu::isa_name(isa));
  }
  return names;
}

template <clockid_t clock>
std::int64_t nanoseconds() {
  timespec now{};
  if (clock_gettime(clock, &now) != 0) throw std::runtime_error("clock_gettime failed");
  return std::int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

// CPU nanoseconds of each of `calls` calls, without the interpreter's loop between them.
template <clockid_t clock>
py::list cpu_times(const py::object& function, int calls) {
  if (calls < 1) throw py::value_error("calls must be at least 1, got " + std::to_string(calls));
  py::list times(calls);
  for (int i = 0; i < calls; ++i) {
    const std::int64_t start = nanoseconds<clock>();
    py::object result = function();
    times[i] = nanoseconds<clock>() - start;
  }
  return times;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build metadata, CPU features, the kernels' instruction set and CPU timers of memkern.";
  m.def("build_info", &build_info, "Versions, compiler, git state and architectures of this build, as a dict.");
  m.def("cpu_features", &cpu_features, "Processor features by name (x86; empty elsewhere).");
  m.def("cpu_isas", &cpu_isas, "Instruction sets that the CPU kernels can use here, smallest first.");
  m.def(
      "cpu_isa", [] { return cpu::isa_name(cpu::isa()); },
      "The instruction set that the CPU kernels use: the best one here, or MEMKERN_CPU_ISA.");
  m.def("process_cpu_ns", &nanoseconds<CLOCK_PROCESS_CPUTIME_ID>, "CPU nanoseconds of all threads of this process.");
  m.def("thread_cpu_ns", &nanoseconds<CLOCK_THREAD_CPUTIME_ID>, "CPU nanoseconds of the calling thread.");
  m.def("process_cpu_times", &cpu_times<CLOCK_PROCESS_CPUTIME_ID>, py::arg("function"), py::arg("calls"),
        "Process CPU nanoseconds of each of `calls` calls of `function()`, timed outside the interpreter's loop.");
  m.def("thread_cpu_times", &cpu_times<CLOCK_THREAD_CPUTIME_ID>, py::arg("function"), py::arg("calls"),
        "Thread CPU nanoseconds of each of `calls` calls of `function()`, timed outside the interpreter's loop.");
}
