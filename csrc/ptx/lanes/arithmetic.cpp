// Which file an arithmetic instruction belongs to.
#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

bool is_logic(const std::string& name) {
  return name == "and" || name == "or" || name == "xor" || name == "not";
}
bool is_integer(Type type) {
  switch (type) {
    case kU16:
    case kS16:
    case kU32:
    case kS32:
    case kU64:
    case kS64:
    case kU16x2:
    case kS16x2:
      return true;
    default:
      return false;
  }
}

}  // namespace

void decode_arithmetic(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  if (is_logic(name) && modifiers.take("pred")) return decode_predicate_logic(modifiers, instruction);
  expect_operands(modifiers, instruction, std::string("dssss").substr(0, instruction.num_operands()).c_str());
  if (decode_bits(modifiers, instruction)) return;
  if (name == "addc" || name == "subc" || name == "madc" || modifiers.peek("cc"))
    return decode_carry(modifiers, instruction);
  const Type type = modifiers.type();
  if (is_integer(type)) {
    decode_integer(modifiers, instruction, type);
  } else if (type == kF32 || type == kF64) {
    decode_floating(modifiers, instruction, type);
  } else if (type == kF16 || type == kBF16 || type == kF16x2 || type == kBF16x2) {
    decode_half(modifiers, instruction, type);
  }
}

}  // namespace fused_resnet::ptx
