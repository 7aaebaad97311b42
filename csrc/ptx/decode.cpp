// From an opcode to the file that knows it.
#include <algorithm>
#include <map>

#include "ptx/copies/tensor_maps.h"
#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

struct Entry {
  Decoder decoder;
  int min_operands, max_operands;  // the decoder may narrow this by modifiers
  Class counted;                   // unless the decoder says otherwise
};

const std::map<std::string, Entry>& table() {
  static const std::map<std::string, Entry> entries = {
      // PTX ISA 9.7.1, 9.7.2: integers
      {"add", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"addc", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"sub", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"subc", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"mul", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"mul24", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"mad", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"mad24", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"madc", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"sad", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"div", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"rem", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"abs", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"neg", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"min", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"max", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"popc", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"clz", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"bfind", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"fns", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"brev", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"bfe", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"bfi", {decode_arithmetic, 5, 5, Class::kInteger}},
      {"dp4a", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"dp2a", {decode_arithmetic, 4, 4, Class::kInteger}},
      // 9.7.8: logic and shifts
      {"and", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"or", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"xor", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"not", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"cnot", {decode_arithmetic, 2, 2, Class::kInteger}},
      {"lop3", {decode_arithmetic, 5, 5, Class::kInteger}},
      {"shf", {decode_arithmetic, 4, 4, Class::kInteger}},
      {"shl", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"shr", {decode_arithmetic, 3, 3, Class::kInteger}},
      {"prmt", {decode_arithmetic, 4, 4, Class::kInteger}},
      // 9.7.3, 9.7.4: floating point
      {"fma", {decode_arithmetic, 4, 4, Class::kFloating}},
      {"copysign", {decode_arithmetic, 3, 3, Class::kFloating}},
      {"testp", {decode_move, 2, 2, Class::kCompare}},
      {"rcp", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"sqrt", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"rsqrt", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"sin", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"cos", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"lg2", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"ex2", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      {"tanh", {decode_arithmetic, 2, 2, Class::kSpecialFunction}},
      // 9.7.6, 9.7.7: comparison and selection
      {"set", {decode_move, 3, 4, Class::kCompare}},
      {"setp", {decode_move, 3, 4, Class::kCompare}},
      {"selp", {decode_move, 4, 4, Class::kMove}},
      {"slct", {decode_move, 4, 4, Class::kMove}},
      // 9.7.9: data movement and conversion
      {"mov", {decode_move, 2, 2, Class::kMove}},
      {"cvta", {decode_move, 2, 2, Class::kMove}},
      {"isspacep", {decode_move, 2, 2, Class::kCompare}},
      {"mapa", {decode_move, 3, 3, Class::kMove}},
      {"getctarank", {decode_move, 2, 2, Class::kMove}},
      {"createpolicy", {decode_move, 1, 4, Class::kMove}},
      {"cvt", {decode_conversion, 2, 3, Class::kConversion}},
      {"ld", {decode_memory, 2, 3, Class::kMemory}},
      {"ldu", {decode_memory, 2, 2, Class::kMemory}},
      {"st", {decode_memory, 2, 3, Class::kMemory}},
      {"atom", {decode_memory, 3, 5, Class::kMemory}},
      {"red", {decode_memory, 2, 3, Class::kMemory}},
      {"prefetch", {decode_memory, 1, 1, Class::kMemory}},
      {"prefetchu", {decode_memory, 1, 1, Class::kMemory}},
      {"applypriority", {decode_memory, 2, 2, Class::kMemory}},
      {"discard", {decode_memory, 2, 2, Class::kMemory}},
      {"shfl", {decode_warp, 5, 5, Class::kExchange}},
      // 9.7.13: warps
      {"vote", {decode_warp, 3, 3, Class::kExchange}},
      {"match", {decode_warp, 3, 3, Class::kExchange}},
      {"elect", {decode_warp, 2, 2, Class::kExchange}},
      {"redux", {decode_warp, 3, 3, Class::kExchange}},
      {"activemask", {decode_warp, 1, 1, Class::kExchange}},
      // 9.7.12, 9.7.19: control
      {"bra", {decode_control, 0, 1, Class::kControl}},
      {"brx", {decode_control, 2, 2, Class::kControl}},
      {"ret", {decode_control, 0, 0, Class::kControl}},
      {"exit", {decode_control, 0, 0, Class::kControl}},
      {"trap", {decode_control, 0, 0, Class::kControl}},
      {"brkpt", {decode_control, 0, 0, Class::kControl}},
      {"nanosleep", {decode_control, 1, 1, Class::kControl}},
      {"setmaxnreg", {decode_control, 1, 1, Class::kControl}},
      {"griddepcontrol", {decode_control, 0, 0, Class::kControl}},
      // 9.7.13: barriers and fences; bar.warp.sync is a warp's, see decode()
      {"bar", {decode_barrier, 1, 4, Class::kBarrier}},
      {"barrier", {decode_barrier, 0, 4, Class::kBarrier}},
      {"fence", {decode_barrier, 0, 2, Class::kFence}},
      {"membar", {decode_barrier, 0, 0, Class::kFence}},
      {"mbarrier", {decode_mbarrier, 1, 4, Class::kMbarrier}},
      // 9.7.9.25 to 9.7.9.27: asynchronous copies
      {"cp", {decode_copy, 0, 7, Class::kCpAsync}},
      {"tensormap", {decode_tensormap, 2, 3, Class::kMemory}},
      {"multimem", {decode_copy, 2, 4, Class::kMemory}},
      // 9.7.14, 9.7.15: matrices
      {"ldmatrix", {decode_matrix, 2, 2, Class::kMatrixLoad}},
      {"stmatrix", {decode_matrix, 2, 2, Class::kMatrixStore}},
      {"movmatrix", {decode_matrix, 2, 2, Class::kExchange}},
      {"mma", {decode_matrix, 4, 8, Class::kMma}},
      {"wgmma", {decode_wgmma, 0, 10, Class::kWgmma}},
  };
  return entries;
}

}  // namespace

Modifiers::Modifiers(const std::string& op, const std::string& text) : text_(text) {
  size_t begin = 0;
  while (begin <= op.size()) {
    const size_t end = std::min(op.find('.', begin), op.size());
    parts_.push_back(op.substr(begin, end - begin));
    begin = end + 1;
  }
  name_ = parts_.front();
  parts_.erase(parts_.begin());
}

bool Modifiers::take(const char* modifier) {
  const auto found = std::find(parts_.begin(), parts_.end(), modifier);
  if (found == parts_.end()) return false;
  parts_.erase(found);
  return true;
}

bool Modifiers::peek(const char* modifier) const {
  return std::find(parts_.begin(), parts_.end(), modifier) != parts_.end();
}

bool Modifiers::precedes(const char* one, const char* other) const {
  const auto first = std::find(parts_.begin(), parts_.end(), one);
  return std::find(first, parts_.end(), other) != parts_.end();
}

int Modifiers::any(std::initializer_list<const char*> modifiers) {
  int index = 0;
  for (const char* modifier : modifiers) {
    if (take(modifier)) return index;
    ++index;
  }
  return -1;
}

std::vector<Type> Modifiers::types() {
  std::vector<Type> found;
  std::vector<std::string> others;
  for (const std::string& part : parts_) {
    const Type type = type_of(part);
    if (type != kNoType)
      found.push_back(type);
    else
      others.push_back(part);
  }
  parts_ = others;
  return found;
}

Type Modifiers::type() {
  const std::vector<Type> found = types();
  if (found.size() != 1) refuse(format("%zu types instead of one", found.size()));
  return found[0];
}

std::string Modifiers::rest() {
  if (parts_.empty()) return "";
  const std::string first = parts_.front();
  parts_.erase(parts_.begin());
  return first;
}

void Modifiers::done() const {
  if (!parts_.empty()) refuse("modifier ." + parts_.front());
}

void Modifiers::refuse(const std::string& why) const {
  throw std::runtime_error("instruction not supported: " + text_ + (why.empty() ? "" : " (" + why + ")"));
}

void decode(Instruction& instruction, const std::string& op) {
  Modifiers modifiers(op, instruction.text);
  const auto found = table().find(modifiers.name());
  if (found == table().end()) modifiers.refuse("no such instruction is known");
  const Entry& entry = found->second;
  const int count = instruction.num_operands();
  if (count < entry.min_operands || count > entry.max_operands) modifiers.refuse(format("%d operands", count));
  instruction.counted = entry.counted;
  const bool is_warp_barrier = op.compare(0, 9, "bar.warp.") == 0;  // 9.7.13.2
  (is_warp_barrier ? decode_warp : entry.decoder)(modifiers, instruction);
  modifiers.done();
  if (instruction.handler == nullptr) modifiers.refuse("no such form is known");
}

}  // namespace fused_resnet::ptx
