#include "cpu/amx.h"
#include "spike_conv/cpu_tiles.h"

namespace trtkern {

extern const SpikePlanner kTilesForward = nullptr, kTilesWeightGrad = nullptr;

}  // namespace trtkern
