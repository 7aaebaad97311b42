// The C interface.
#include "ptx/interface.h"

#include <cstdio>
#include <ctime>

#include "ptx/machine/machine.h"

using fused_resnet::ptx::Fault;
using fused_resnet::ptx::format;
using fused_resnet::ptx::Instruction;
using fused_resnet::ptx::Machine;
using fused_resnet::ptx::Program;

namespace {

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void count_distinct_sectors(const Machine& machine, PtxCounts& counts) {
  for (const auto& region : machine.regions) {
    for (const bool touched : region.sectors_read) counts.distinct_load_sectors += touched;
    for (const bool touched : region.sectors_written) counts.distinct_store_sectors += touched;
  }
}

// Whatever stops a launch is among the reports.
bool ran(Machine& machine) {
  try {
    machine.run();
    return true;
  } catch (const Fault& fault) {
    const std::string kind = format("[%s]", fault.what());
    for (const auto& report : machine.reports)
      if (report.compare(0, kind.size(), kind) == 0) return false;
    machine.reports.push_back(format("[fault] %s\n    at ", fault.what()) + machine.where(machine.pc));
  } catch (const std::exception& error) {
    machine.reports.push_back(format("[fault] %s\n    at ", error.what()) + machine.where(machine.pc));
  }
  return false;
}

}  // namespace

// Read from the file by fused_resnet.emulation.library before the library is loaded.
extern "C" __attribute__((used, visibility("default"))) const char fused_resnet_ptx_interface[] =
    "fused_resnet interface of ptx: " FUSED_RESNET_PTX_INTERFACE;

void* ptx_program(int32_t registers, int32_t predicates, int32_t local_bytes) {
  auto* program = new Program;
  program->num_registers = registers;
  program->num_predicates = predicates;
  program->local_bytes = local_bytes;
  return program;
}

void ptx_free(void* program) {
  delete static_cast<Program*>(program);
}

const char* ptx_add(void* program, const char* op, int32_t predicate, int32_t negated, const PtxOperand* operands,
                    const int32_t* counts, int32_t num_operands, int32_t line, const char* text, int32_t target) {
  static thread_local std::string error;
  Instruction instruction;
  instruction.guard = predicate;
  instruction.guard_negated = negated != 0;
  instruction.line = line;
  instruction.text = text;
  instruction.target = target;
  for (int k = 0; k < num_operands; ++k) {
    instruction.groups.emplace_back(static_cast<int>(instruction.flat.size()), counts[k]);
    instruction.flat.insert(instruction.flat.end(), operands, operands + counts[k]);
    operands += counts[k];
  }
  try {
    fused_resnet::ptx::decode(instruction, op);
  } catch (const std::exception& refusal) {
    error = refusal.what();
    return error.c_str();
  }
  auto* to = static_cast<Program*>(program);
  to->has_wgmma = to->has_wgmma || instruction.counted == fused_resnet::ptx::Class::kWgmma;
  to->instructions.push_back(std::move(instruction));
  return nullptr;
}

int32_t ptx_launch(const PtxLaunch* launches, int32_t num_launches, const PtxRegion* regions, int32_t num_regions,
                   const PtxOptions* options, PtxOutcome* outcome, char* reports, int32_t size) {
  const double begin = cpu_seconds();
  Machine machine(launches, num_launches, regions, num_regions, *options);
  const bool is_whole = ran(machine);
  count_distinct_sectors(machine, machine.counts);
  outcome->counts = machine.counts;
  outcome->num_reports = static_cast<int32_t>(machine.reports.size());
  outcome->faulted = is_whole ? 0 : 1;
  std::string all;
  for (const auto& report : machine.reports) all += report + "\n";
  snprintf(reports, static_cast<size_t>(size), "%s", all.c_str());
  outcome->seconds = cpu_seconds() - begin;
  return outcome->num_reports;
}
