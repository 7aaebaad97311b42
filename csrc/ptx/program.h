// A kernel as its instructions, decoded.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx/interface.h"
#include "ptx/values.h"

namespace fused_resnet::ptx {

using Lanes = u32;  // a bit a lane of a warp
constexpr Lanes kAllLanes = ~0u;

// As in fused_resnet/emulation/interface.py.
enum OperandKind : s32 { kNone, kRegister, kPredicate, kImmediate, kSpecial, kSink, kLabel, kMemory };
enum SpecialRegister : s32 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kLanemaskEq,
  kClock,
  kSmid,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kClusteridX,
  kClusteridY,
  kClusteridZ,
  kNclusteridX,
  kNclusteridY,
  kNclusteridZ,
  kDynamicSmemSize,
  kTotalSmemSize,
  kNwarpid,
  kZero,
};

class Machine;
struct Warp;
struct Instruction;
// `mask` has the lanes whose guard is true. It is never empty.
using Handler = void (*)(Machine&, Warp&, const Instruction&, Lanes mask);

// What an instruction demands of the lanes of its warp (PTX ISA 9.7.13.1 and the texts on .aligned and .sync).
enum class Convergence : u8 {
  kFree,     // each lane for itself
  kAligned,  // all lanes of the warp together
  kMembers,  // the lanes of a mask, which is operand `members`
};

// What is counted (PtxCounts); wavefronts and sectors are counted where memory is touched.
enum class Class : u8 {
  kInteger,
  kFloating,
  kHalf,
  kConversion,
  kSpecialFunction,
  kMove,
  kCompare,
  kControl,
  kExchange,
  kMemory,
  kMatrixLoad,
  kMatrixStore,
  kCpAsync,
  kBulkCopy,
  kMma,
  kWgmma,
  kBarrier,
  kMbarrier,
  kFence,
  kWait,
};

struct Instruction {
  Handler handler = nullptr;
  Class counted = Class::kInteger;
  std::vector<PtxOperand> flat;             // all operands, vectors taken apart
  std::vector<std::pair<int, int>> groups;  // of each operand: where it begins in `flat`, how many
  int guard = -1;                           // a predicate, or -1
  bool guard_negated = false;
  Type type = kNoType, from = kNoType, third = kNoType;
  int a = 0, b = 0, c = 0, d = 0;  // what the handler's file says
  bool flush = false;              // .ftz
  bool is_copy = false;            // mov of one register or constant
  u8 scope = 0;                    // of a strong operation: a Scope
  Convergence convergence = Convergence::kFree;
  int members = -1;
  int target = -1;  // of a branch
  int line = 0;
  std::string text;

  const PtxOperand& at(int k) const { return flat[groups[k].first]; }
  const PtxOperand& at(int k, int element) const { return flat[groups[k].first + element]; }
  int count(int k) const { return groups[k].second; }
  int num_operands() const { return static_cast<int>(groups.size()); }
};

struct Program {
  std::vector<Instruction> instructions;
  int num_registers = 0, num_predicates = 0, local_bytes = 0;
  bool has_wgmma = false;
};

// The parts of an opcode behind its name, taken one by one. What is left over is refused: nothing is ignored silently.
class Modifiers {
 public:
  Modifiers(const std::string& op, const std::string& text);
  const std::string& name() const { return name_; }
  bool take(const char* modifier);
  bool peek(const char* modifier) const;                    // whether it is there
  bool precedes(const char* one, const char* other) const;  // whether both are there, in this order
  int any(std::initializer_list<const char*> modifiers);    // the first one's index, or -1
  std::vector<Type> types();                                // all types, in order
  Type type();                                              // the only one
  std::string rest();                                       // the first left over, taken; or ""
  void done() const;                                        // throws if something is left
  [[noreturn]] void refuse(const std::string& why = "") const;

 private:
  std::string name_, text_;
  std::vector<std::string> parts_;
};

// Gives an instruction its handler. One function a file of handlers; each knows its opcodes, modifiers and operands.
using Decoder = void (*)(Modifiers&, Instruction&);
void decode(Instruction& instruction, const std::string& op);  // throws std::runtime_error
void decode_arithmetic(Modifiers&, Instruction&);              // arithmetic.cpp
void decode_conversion(Modifiers&, Instruction&);              // conversions.cpp: cvt
void decode_move(Modifiers&, Instruction&);      // moves.cpp: mov selp setp prmt cvta and logic of predicates
void decode_control(Modifiers&, Instruction&);   // control.cpp: bra ret exit trap nanosleep setmaxnreg griddepcontrol
void decode_memory(Modifiers&, Instruction&);    // memory.cpp: ld st atom red prefetch
void decode_warp(Modifiers&, Instruction&);      // warps.cpp: shfl vote match elect redux activemask bar.warp
void decode_barrier(Modifiers&, Instruction&);   // barriers.cpp: bar barrier fence membar
void decode_mbarrier(Modifiers&, Instruction&);  // mbarriers.cpp
void decode_copy(Modifiers&, Instruction&);      // copies.cpp: cp.async, cp.reduce.async, bulk and tensor
void decode_matrix(Modifiers&, Instruction&);    // matrices.cpp: ldmatrix stmatrix mma
void decode_wgmma(Modifiers&, Instruction&);     // wgmma.cpp

}  // namespace fused_resnet::ptx
