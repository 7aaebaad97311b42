// What _host_checks is made of, a function for each file.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

void bind_tiles(pybind11::module_& m);

}  // namespace fused_resnet
